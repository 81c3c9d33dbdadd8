import os

from pipeline.training.attempt import _cause
from pipeline.training.gloo import choose, interface


def test_the_interface_of_an_address_is_found_and_one_that_is_set_is_left(monkeypatch):
    assert interface("127.0.0.1") == "lo"
    assert interface("203.0.113.77") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    choose()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_group_that_never_met_is_named_without_a_rank():
    assert str(_cause(RuntimeError("[gloo] connect timed out"))).startswith("a rank lost touch")
