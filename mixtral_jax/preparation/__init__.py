"""Web pages to tokens: reading, extraction, filters, deduplication, token caches and the report, on datatrove."""
