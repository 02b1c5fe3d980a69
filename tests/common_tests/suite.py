"""transformers' own tests of all its models, for every family with every head: once as they are
and once converted.

    COMMON_TESTS=transformers-5.23.0/tests pytest -n auto tests/common_tests/suite.py

The tests are in transformers' source distribution alone: `.ci/run` fetches it and runs this. Which
tests can't pass, and why, stands in `excepted.py`. A run fails by any other that fails, and by one
of those that passes.
"""

import functools
import importlib
import inspect
import os
import sys
import types
import unittest
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from common_tests.excepted import EXCEPTED, LEFT_OUT, TOLD
from support import hf_models
from transformers import PreTrainedModel

import bertfast
from bertfast import hf

LENGTHS = (7, 3, 5, 7)


def load_tests_module():
    """test_modeling_common.py, without the tests of generation and of exporters, which it imports
    and the source distribution lacks."""
    package = "transformers_tests"
    contents = {
        package: {"__path__": [os.environ["COMMON_TESTS"]]},
        f"{package}.exporters": {"__path__": []},
        f"{package}.generation": {"__path__": []},
    }
    missing = {"exporters.test_export": "ExportTesterMixin"}
    missing["generation.test_utils"] = "GenerationTesterMixin"
    for name, tests in missing.items():
        contents[f"{package}.{name}"] = {tests: type(tests, (), {})}
    for name, content in contents.items():
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(content)
    return importlib.import_module(f"{package}.test_modeling_common")


COMMON = load_tests_module()


class Asked:
    """The tests' questions to a family: a tiny configuration, a batch, and their sizes."""

    is_training = True
    batch_size, seq_length = len(LENGTHS), max(LENGTHS)
    num_choices = 2
    hidden_size, num_hidden_layers = hf_models.WIDTH, hf_models.LAYERS
    num_attention_heads = hf_models.HEADS

    def __init__(self, base, arguments):
        self.config_class, self.arguments = base.config_class, arguments

    def get_config(self):
        return self.config_class(**self.arguments)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), hf_models.batch(LENGTHS)


class Tests(COMMON.ModelTesterMixin):
    """Of one family."""

    def setUp(self):
        base, *_ = self.all_model_classes
        self.model_tester = Asked(base, hf_models.FAMILIES[self.prefix])

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """With the labels of pre-training's heads, which the families' own testers add."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            ids = inputs["input_ids"]
            inputs["labels"] = torch.zeros_like(ids)
            for second in ("next_sentence_label", "sentence_order_label"):
                if second in inspect.signature(model_class.forward).parameters:
                    inputs[second] = torch.zeros_like(ids[:, 0])
        return inputs


class ConvertedTests(Tests):
    """With each model converted as its user would do it: as soon as its class was called, or
    from_pretrained has loaded it."""

    def setUp(self):
        super().setUp()
        patches = ExitStack()
        self.addCleanup(patches.close)
        makers = Makers()
        for kind in self.all_model_classes:
            converting = makers.converting(kind.__init__)
            patches.enter_context(mock.patch.object(kind, "__init__", converting))
        loader = PreTrainedModel.from_pretrained.__func__
        loading = classmethod(makers.converting(loader))
        patches.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", loading))

    def test_every_layer_is_fused(self):
        for kind in self.all_model_classes:
            rows = bertfast.report(kind(self.model_tester.get_config()))
            assert rows and not any(row.reason for row in rows), rows


class Makers:
    """Functions that make models. Of those that call each other the outermost has a model to be
    converted."""

    def __init__(self):
        self.running = 0

    def converting(self, maker):
        @functools.wraps(maker)
        def converted(owner, *args, **kwargs):
            self.running += 1
            try:
                made = maker(owner, *args, **kwargs)
            finally:
                self.running -= 1
            if not self.running:
                model = owner if made is None else made[0] if isinstance(made, tuple) else made
                known = any(map(hf.head_class, model.modules()))
                bertfast.optimize(model, masked_lm_loss="fused" if known else None)
            return made

        return converted


def models_of(family):
    """All classes of a family that users make, the plain model first."""
    module = importlib.import_module(family.module)
    named = [getattr(module, name) for name in module.__all__]
    kinds = [
        kind
        for kind in named
        if issubclass(kind, PreTrainedModel) and not kind.__name__.endswith("PreTrainedModel")
    ]
    return tuple(sorted(kinds, key=lambda kind: kind.__name__ != f"{family.prefix}Model"))


def add_classes():
    for family in hf_models.KNOWN:
        for how, tests in (("Stock", Tests), ("Converted", ConvertedTests)):
            name = how + family.prefix
            body = {"__module__": __name__, "prefix": family.prefix}
            body |= {"all_model_classes": models_of(family), **TOLD.get(family.prefix, {})}
            body |= dict.fromkeys(filter(_is_left_out, dir(tests)))
            made = type(name, (tests, unittest.TestCase), body)
            for excepted in EXCEPTED:
                if excepted.names(how, family.prefix):
                    test = getattr(made, excepted.test)
                    setattr(made, excepted.test, _must_fail(test, excepted.reason))
            globals()[name] = made


def _is_left_out(name):
    return any(name.startswith(start) and inside in name for start, inside, _ in LEFT_OUT)


def _must_fail(test, reason):
    return pytest.mark.xfail(strict=True, reason=reason)(test)


add_classes()
