"""The KV store: prompt caches of models that were unloaded, on this node's disk, for the next time they are loaded.

It is people's conversations: one private folder, files of this user alone, bounded in size and age, and never in a log.
"""
