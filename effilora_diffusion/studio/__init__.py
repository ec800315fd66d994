"""The web UI: Gradio tabs over the library. It holds no training or sampling logic of its own."""
