"""Chat templates: how a conversation becomes the text that a model reads. Shared by the harnesses that render here.

A template came with the model and is foreign code, so it runs in a sandbox and is bounded in time and size. Only
`sandbox` and `template` import jinja2; the daemon imports neither.
"""
