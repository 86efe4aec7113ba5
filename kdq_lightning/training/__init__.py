"""Everything that runs inside a Trainer: callbacks, quantization after training, the dashboard.

The files in the order in which a run uses them:

    trainer.py          the Trainer with this project's defaults, and the command `quantize`
    header.py           the first lines that a command prints
    callbacks.py        while it trains: files of the run folder, logged steps; predictions of `kdq predict`
    interruption.py     saves a checkpoint every few minutes and at SIGTERM
    post_training.py    the callback that quantizes after training: decides what is missing, and calls `quantize`
    source.py           gives it networks, images and evaluations: trained_run.py from a run of this project,
                        plain_run.py from any other Lightning project (loaders.py reads its images)
    quantized_run.py    a quantized network -> its packed file and its record (written by runs/result_folder.py)
    dashboard.py        the records -> TensorBoard and other loggers
                        (curves.py makes points, run_figures.py figures, result_tables.py tables)

progress_bars.py shows how far a quantization is. lightning_internals.py holds every use of Lightning's private names.
"""
