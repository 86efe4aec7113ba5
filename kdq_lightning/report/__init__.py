"""`kdq report`: tables, figures, tests and the answer, from the records of any number of runs.

The files in the order in which the data pass through them:

    read_rows.py      the records below some folders -> `Row`s of one `Cell` a bit width (rows.py), by data set
    findings.py       the rows of a data set -> `Findings`: every test and choice, computed once
                      (duels.py compares at equal bytes, file_choice.py chooses by bytes, advice.py what to ship,
                      significance.py tests)
    document.py       the findings -> report.md and the files beside it, in the order in which they are read
                      (answer.py, gains.py, shipping.py, claims.py and words.py write sentences, tables.py and
                      figures.py show numbers)

A number in a table comes from `Cell.summaries` (means and deviations of the records) or from `Findings` (differences
and p-values); the functions of tables.py are named after the tables. How it is shown is decided in runs/records.py
(captions, decimals), formatting.py (numbers in text), table_formats.py (Markdown, LaTeX, CSV) and
`kdq_lightning.strategies` (titles, colours). published.py holds the values of the published study.
"""
