"""The jobs of `run.py --job=NAME`, one per file; files that begin with an underscore hold code that jobs share.

A job's file defines `run(built, workdir, inputs)`, and may define:

    Settings, check    the job's settings in the config, and a check of them; see `_settings`
    ready              (built, inputs) → None: checks that need no work directory
    RUN                what the work directory has to hold: "needs" a run (the default), "begins" one unless it holds one, or
                       "ignores" it
    EXAMPLES           False if the job can do without the data's examples
"""
