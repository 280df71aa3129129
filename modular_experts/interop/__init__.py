"""Interop: other people's file formats. Hugging Face checkpoints in and out; nothing here trains or merges."""
