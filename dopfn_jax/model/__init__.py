"""The model: standardisation, embeddings, attention, transformer and bar distribution."""
