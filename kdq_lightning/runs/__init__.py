"""Run folders on disk: versions, checkpoints, records and the hash of their settings.

The files in the order in which a run uses them:

    config_hash.py      the settings of a command -> the hash that its records carry
    versions.py         a run folder -> its folders `version_N`, and which of them are finished
    checkpoints.py      a path (run folder, checkpoint, packed file, state dict) -> `TrainedNetwork`s
                        (trained_network.py defines them, state_dicts.py reads plain files, class_names.py compares
                        the classes of network and data)
    result_folder.py    the results of one version: what is there is read, what is new is added
    records.py          `Record`, a row of `quantized.csv`, and the functions that read and write the result files
                        (tables.py reads and writes CSV, identity.py makes the names of files and vectors)
"""
