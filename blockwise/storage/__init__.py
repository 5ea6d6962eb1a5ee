"""Files: durable writes, plain arrays, what killed writers left."""
