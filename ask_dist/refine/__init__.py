"""The refiner: carries the drift of rows that were just re-encoded over to the rows that were not."""
