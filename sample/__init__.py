"""Programs that use trained models: each module is one job, with a Config and a main(config)."""
