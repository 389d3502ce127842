"""What names of modules mean."""

from ia3rt.adapters.site import name_matches


def test_a_name_matches_whole_components_only() -> None:
    assert name_matches("h.0.mlp.fc", ["fc"])
    assert not name_matches("h.0.mlp.pre_fc", ["fc"])
    assert not name_matches("h.0.mlp.fc", "fc")
