"""Pages about runs, each one file that asks no other host for anything: :mod:`.page` of one run, :mod:`.compare` of several."""
