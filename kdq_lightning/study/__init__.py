"""`kdq study`: a list of runs, done one after the other or several at once, resumed where they were cut off."""
