"""What a model writes, taken apart into thoughts, text and tool calls; and the grammars that hold it to calls.

Shared by the harnesses. Everything here is pure and incremental: the pieces of an answer do not depend on where its
text was cut, and collected they are the whole answer's.
"""
