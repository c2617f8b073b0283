"""How large a bank a number of workers needs: a queueing model with measured constants."""
