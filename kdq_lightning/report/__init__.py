"""`kdq report`: from the records of any number of runs to tables, figures, tests and the answer."""
