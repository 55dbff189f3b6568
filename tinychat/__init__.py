"""tinychat: build your own ChatGPT, one chapter at a time, then talk to it in your terminal."""

__version__ = "0.1.0"
