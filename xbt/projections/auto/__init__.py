"""Choosing a projection and a query mixture by held-out retrieval, with the old query as the fallback."""
