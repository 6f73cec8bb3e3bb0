"""The torch harness: safetensors models on our own engine, on one device or split over several. Cheap to import."""
