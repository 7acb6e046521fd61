from pathlib import Path

import pytest

from dflash_train.config import Dtype, TargetConfig
from dflash_train.features.target import load_target
from dflash_train.features.target_text import load_target_text
from dflash_train.testing import save_tiny_target


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_a_target_without_weights_describes_itself_as_the_loaded_one_does(
    tmp_path: Path, has_generation_config: bool
) -> None:
    folder = save_tiny_target(tmp_path / "target")
    if not has_generation_config:
        (folder / "generation_config.json").unlink()
    config = TargetConfig(name_or_path=str(folder), dtype=Dtype.float32)
    whole = load_target(config, [1, 3])
    text = load_target_text(config, [1, 3])
    assert text.describe() == whole.describe()
    assert text.stop_token_ids == whole.stop_token_ids
    assert text.tokenizer_hash == whole.tokenizer_hash
