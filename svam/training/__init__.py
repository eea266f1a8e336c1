"""One loop, one checkpoint format, and one module per trained part."""
