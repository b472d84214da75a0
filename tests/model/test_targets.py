"""From the user's words to a plan."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, inject
from lightning_lora.model.targets import matches, resolve

CONFIG = LoRAConfig(r=4)


def planned(model, targets="all-linear", **settings) -> list[str]:
    return list(resolve(model, targets, CONFIG, **settings).layers)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.q_proj", "q_proj", True),
        ("a.q_proj", "a.q_proj", True),
        ("a.q_proj", "*.q_proj", True),
        ("a.b.q_proj", "b.*", True),
        ("q_proj", "q_proj", True),
        ("a.xq_proj", "q_proj", False),
        ("a.q_proj.b", "q_proj", False),
        ("layers.10.q", "layers.1.q", False),
        ("layers.1.q", "layers.[01].q", True),
        ("layers.8.q", "layers.[8-15].q", True),
        ("layers.15.q", "layers.[8-15].q", True),
        ("layers.16.q", "layers.[8-15].q", False),
        ("layers.7.q", "layers.[8-15].q", False),
        ("layers.1.q", "layers.[8-15].q", False),
        ("layers.150.q", "layers.[8-15].q", False),
        ("layers.5.q", "layers.[!8-15].q", False),
        ("a.layers.9.attn.q", "layers.[8-15].*", True),
        ("h.12.mlp.3.up", "h.[0-12].mlp.[2-3].up", True),
        ("layers.15.q", "layers.1[0-5].q", True),
        ("layers.42.q", "layers.[0-9][0-9].q", True),
    ],
)
def test_patterns_match_whole_names_and_dotted_suffixes(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize("pattern", ["layers.[15-8].q", "layers.[0-10000].q"])
def test_a_range_without_numbers_or_with_too_many_is_refused(pattern, net):
    with pytest.raises(TargetError, match="holds no number, or more than 10,000"):
        planned(net, pattern)


def test_targets_excludes_and_modules_to_train_can_be_ranges_of_layers():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(13))})
    assert planned(model, "layers.[9-11].q") == ["layers.9.q", "layers.10.q", "layers.11.q"]
    assert planned(model, exclude="layers.[0-10].*") == ["layers.11.q", "layers.12.q"]
    assert resolve(model, "layers.0.q", CONFIG, train="layers.[11-12].q").train == ("layers.11.q", "layers.12.q")


def test_all_linear_takes_every_linear_layer_but_the_head(net):
    plan = resolve(net, "all-linear", CONFIG)
    assert len(plan.layers) == 6
    assert plan.left == {"head": "output head"}


def test_a_model_that_names_its_head_is_believed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def get_output_embeddings(self):
            return self.out

    assert planned(Named()) == ["inner", "last"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), ["0"]),
        (nn.Sequential(nn.Linear(8, 8)), ["0"]),
        (nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)})] * 1)}), ["blocks.0.up"]),
    ],
    ids=["last of a sequence", "the only layer", "a block has no head"],
)
def test_the_head_is_the_last_layer_outside_repeated_blocks(model, expected):
    assert planned(model) == expected


def test_a_mapping_gives_each_pattern_its_config_and_later_entries_win(net):
    plan = resolve(net, {"all-linear": CONFIG, "q_proj": LoRAConfig(r=2), "blocks.1.q_proj": LoRAConfig(r=1)}, CONFIG)
    ranks = {name: config.r for name, config in plan.layers.items()}
    assert ranks["downs.0"] == 4
    assert (ranks["blocks.0.q_proj"], ranks["blocks.1.q_proj"]) == (2, 1)


def test_a_layer_that_a_later_pattern_takes_is_not_reported_as_left(net):
    plan = resolve(net, {"all-linear": CONFIG, "head": CONFIG}, CONFIG)
    assert "head" in plan.layers
    assert plan.left == {}


def test_exclude_and_train_take_layers_out(net):
    assert planned(net, exclude="blocks.*") == ["downs.0", "downs.1"]
    plan = resolve(net, "all-linear", CONFIG, train=["downs.1", "head"])
    assert plan.train == ("downs.1", "head")
    assert "downs.1" not in plan.layers
    assert plan.left["downs.1"] == "trained whole"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"targets": "k_proj"},
            r"'k_proj' matches no linear layer, embedding or convolution. Closest: q_proj.*end in: .*up_proj.*Pass one",
        ),
        ({"targets": ["q_proj", "qproj"]}, r"target 'qproj' matches no linear layer.*Closest: q_proj"),
        ({"targets": "norm"}, r"only norm \(LayerNorm\). Only linear layers, embeddings and convolutions can be"),
        ({"targets": "blocks.0"}, r"only blocks.0 \(ModuleDict\). Pass 'blocks.0.\*' for the layers inside"),
        ({"exclude": "nope"}, r"exclude 'nope' matches no linear layer"),
        ({"train": "haed"}, r"train 'haed' matches no module. Closest: head"),
        ({"targets": "head", "train": "head"}, r"'head' matches head, but train='head' trains that layer whole"),
        ({"targets": "q_proj", "exclude": "q_proj"}, r"nothing is left to adapt"),
        ({"targets": []}, r"targets is empty"),
    ],
)
def test_a_pattern_that_does_not_fit_is_an_error_that_helps(net, settings, said):
    before = list(net.state_dict())
    targets = settings.pop("targets", "all-linear")
    with pytest.raises(TargetError, match=said):
        inject(net, targets, CONFIG, **settings)
    assert list(net.state_dict()) == before
    assert all(p.requires_grad for p in net.parameters())


def test_a_rank_above_the_layers_is_an_error_naming_the_layer(net):
    with pytest.raises(TargetError, match=r"head: r=9 is more than the full rank 8 of a layer 64 -> 8.*exclude='head'"):
        inject(net, "*", LoRAConfig(r=9))


def test_a_model_without_linear_layers_says_what_it_has():
    with pytest.raises(TargetError, match="has no linear layer to adapt; found 1 Embedding, 1 Conv1d"):
        inject(nn.Sequential(nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)))


def test_tied_weights_are_refused_with_the_way_out():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "mid": nn.Linear(8, 8), "out": nn.Linear(8, 16, bias=False)})
    model["out"].weight = model["embed"].weight
    with pytest.raises(TargetError, match=r"out shares its weight with another layer \(embed.weight, out.weight\)"):
        inject(model, ["mid", "out"], CONFIG)


def test_a_layer_that_stands_in_two_places_is_adapted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(8, 2)})
    inject(model, config=CONFIG)
    assert model["a"] is model["b"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 16


def test_layers_whose_function_may_not_be_linear_are_left_alone():
    class Clamped(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(0)

    class Watched(nn.MultiheadAttention):
        def forward(self, *inputs, **settings):
            return super().forward(*inputs, **settings)

    model = nn.ModuleDict(
        {
            "attention": Watched(8, 2),
            "clamped": Clamped(8, 8),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "plain": nn.Linear(8, 8),
            "head": nn.Linear(8, 2),
        }
    )
    plan = resolve(model, "all-linear", CONFIG)
    assert list(plan.layers) == ["plain"]
    assert set(plan.left) == {"attention.out_proj", "clamped", "normed", "head"}
    with pytest.raises(TargetError, match=r"clamped, which cannot be adapted: Clamped overrides Linear.forward"):
        resolve(model, "clamped", CONFIG)


def test_the_plan_needs_no_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert planned(model) == ["0"]
