"""What is known of GPUs by their names."""

import types

import pytest
import torch

from nanope.gpus import MULTIPROCESSORS, PEAK_FLOPS, card_of, expected_mfu, peak_flops

# Names as drivers give them
NAMES = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA H800": 989,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H20": 148,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A40": 150,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 4090 D": 147,
    "NVIDIA GeForce RTX 5090": 209,
    "Tesla T4": 65,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-16GB": 112,
}
UNKNOWN = ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 5090 D", "AMD X9"]


def gpu(monkeypatch, name, multiprocessors=132):
    properties = types.SimpleNamespace(name=name, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda")


def test_peak_flops_by_name(monkeypatch):
    for name, peak in NAMES.items():
        assert peak_flops(gpu(monkeypatch, name)) == peak * 1e12, name
    for name in UNKNOWN:
        assert card_of(name) is None and peak_flops(gpu(monkeypatch, name)) is None, name
    assert peak_flops(torch.device("cpu")) is None


def test_a_slice_has_its_share(monkeypatch):
    assert peak_flops(gpu(monkeypatch, "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 42)) == pytest.approx(312e12 * 42 / 108)
    assert peak_flops(gpu(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16)) == pytest.approx(989e12 * 16 / 132)
    assert peak_flops(gpu(monkeypatch, "NVIDIA B200 MIG 1g.23gb", 18)) is None  # of how many is not known
    assert MULTIPROCESSORS.keys() <= PEAK_FLOPS.keys()


def test_expected_mfu():
    cards = ("A100", "H100", "H100 PCIE", "L4", None)
    assert [expected_mfu(card) for card in cards] == [0.5, 0.35, 0.35, 0.4, 0.4]
