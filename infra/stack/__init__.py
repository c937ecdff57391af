"""The local stack: Prefect, MLflow and Dask on this machine, supervised, below one state folder."""
