"""One reader per data set format; a reader is imported only when `convert.source` names it."""
