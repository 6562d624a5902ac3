"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then never runs the frozen encoders.
"""

from __future__ import annotations

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.plugin.launch import CfgPath, Options, Runs, load


def command(cfg_path: CfgPath, options: Options = None) -> None:
    """Encode the media that are not in the cache yet; each process of a launcher encodes its share."""
    cfg = load(cfg_path, options or [])
    if cfg.run.feature_cache is None:
        raise ConfigError("run.feature_cache is null: name a folder, as in run.feature_cache=output/features")
    from lavis_chatbridge.runners import data, distributed

    with Runs() as runs:
        device = runs.start(cfg)
        _, datasets, model = runs.build(cfg)
        found = data.fill_features(model.to(device).eval(), datasets, cfg.run, cfg.preprocess_cfg)
        if distributed.is_main():
            print(found)
