"""The upstream collection: reading its layout, searching it exactly, and through FAISS."""
