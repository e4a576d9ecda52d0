"""A whole model in a folder, as `diffusers` saves a pipeline."""

import pytest

from evenflow.models.video import VideoConfig
from evenflow.models.video.names import to_diffusers

from .nets import network, theirs
from .test_umt5 import ENCODER, TOKENIZER
from .test_wan_vae import CODEC

LOADED = VideoConfig("small", dim=48, ffn_dim=80, heads=4, layers=2, text_dim=12, freq_dim=32)
NETWORK = network(LOADED)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    other = theirs(LOADED)
    other.load_state_dict(to_diffusers(NETWORK.state_dict()))
    other.save_pretrained(place / "transformer")
    CODEC.vae.save_pretrained(place / "vae")
    ENCODER.save_pretrained(place / "text_encoder")
    TOKENIZER.save_pretrained(place / "tokenizer")
    (place / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return place
