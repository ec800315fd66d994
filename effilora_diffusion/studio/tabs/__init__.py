"""The tabs of the web UI, one file each."""
