"""`graphopt report`: all that is known about a model and its passes, as data and as one page."""
