"""benchmark/tournament.py: ratings, games against search, and positions with a known answer."""

import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch

import ppo_multiagent as ma

pytest.importorskip("pyspiel", reason="optional package open_spiel is not installed")
tournament = importlib.import_module("tournament")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Self-play for some seconds: better than random, far from good."""
    path = tmp_path_factory.mktemp("selfplay") / "run"
    flags = ["--algorithm", "selfplay", "--total-timesteps", 16384 * 8, "--hidden-size", 32, "--no-compile"]
    ma.train(ma.parse_args([*map(str, flags), "--run-dir", str(path)]))
    return path


def boards(*games):
    """The position after the columns of each string, as tournament.positions returns it."""
    played = []
    for columns in games:
        game = ma.ConnectFour(1, torch.device("cpu"))
        for column in columns:
            game.view()
            game.play(game.column(torch.tensor([int(column)])))
        played.append(game.boards)
    return torch.cat(played)


def test_elo_of_known_strengths():
    ratings = torch.tensor([0.0, 200.0, 400.0]).double()
    score = 1 / (1 + 10 ** ((ratings - ratings[:, None]) / 400))
    np.testing.assert_allclose(tournament.elo(score, 100_000), ratings, atol=1)
    assert all(math.isfinite(x) for x in tournament.elo(torch.tensor([[0.5, 0.0], [1.0, 0.5]]), 100))


def test_where_a_win_is_one_move_away():
    """A column of three, a row with two open ends, a row with one, one of two ends above an empty cell."""
    wins = tournament.winning_columns(boards("010101", "223344", "001122", "6223345640"))
    expected = [{0}, {1, 5}, {3}, {5}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in wins] == expected
    assert not tournament.winning_columns(boards("", "3", "0101", "010" + "2" * 2)).any()


@pytest.mark.parametrize("column,wins,blocks", [(0, 1.0, 0.0), (1, 0.0, 1.0), (6, 0.0, 0.0)])
def test_shares_of_wins_and_blocks(monkeypatch, column, wins, blocks):
    """Of a team that always prefers one column. Column 0 wins in the first position; in the second column 1 is the
    threat; the third asks for nothing."""
    monkeypatch.setattr(tournament, "likeliest_columns", lambda team, boards: torch.full((len(boards),), column))
    result = tournament.one_ply(None, boards("010101", "012131", "3"))
    assert (result["of"], result["out_of"]) == (1, 1)
    assert (result["wins_taken"], result["blocks"]) == (wins, blocks)
    assert result["wins_by_chance"] == pytest.approx(1 / 7) and result["blocks_by_chance"] == pytest.approx(1 / 7)


@pytest.mark.slow
def test_a_real_team_is_its_own_mirror_image(run):
    team, _ = tournament.load_team(run)
    positions = tournament.positions(tournament.random_player(torch.Generator().manual_seed(0)), 50)
    result = tournament.one_ply(team, positions)
    assert result["mirrored"] == 1 and result["of"] > 50 and len(positions) == len(positions.unique(dim=0))


def test_every_opponent_can_be_met(run, capsys):
    results = {}
    for opponent in ("random", "mcts-5", str(run), "pool", "one-ply"):
        tournament.main([str(run), opponent, "--games", "60"])
        results[opponent] = json.loads(capsys.readouterr().out)
    assert results["random"]["mean"] > 0.7 and 0.3 < results[str(run)]["mean"] < 0.7
    assert results["random"]["mean"] > results["mcts-5"]["mean"]
    assert results["pool"]["elo"][-1] > 50 and (run / "elo.png").exists()
    assert len(results["pool"]["returns"]) == len(results["pool"]["elo"]) - 1 == 8
    assert results["one-ply"]["random"]["of"] > 50
    with pytest.raises(SystemExit) as stop:
        tournament.main([str(run), "nobody"])
    assert stop.value.code == 2 and "no checkpoint nobody" in capsys.readouterr().err


def test_match_counts_for_the_right_side():
    """A player that builds one column beats one that spreads; in both seats."""
    game, plies = ma.ConnectFour(10, torch.device("cpu")), {"spreader": 0}

    def builder(obs, legal):
        return game.column(torch.full((10,), 3))[: len(obs)]

    def spreader(obs, legal):
        plies["spreader"] += 1
        return game.column(torch.full((10,), plies["spreader"] // 2 % 3))[: len(obs)]

    assert tournament.match(game, builder, spreader).tolist() == [1] * 10
    assert tournament.match(game, spreader, builder).tolist() == [0] * 10


def test_a_match_ends_with_its_last_game():
    game, plies = ma.ConnectFour(10, torch.device("cpu")), []

    def same_column(obs, legal):  # the first player's four are in a column after seven plies
        plies.append(len(obs))
        return game.column(torch.full((10,), 3 if len(plies) // 2 % 2 == 0 else 0))[: len(obs)]

    tournament.match(game, same_column, same_column)
    assert len(plies) == 2 * 7


def test_search_is_given_the_game_as_it_was_played():
    """One that answers the column that was played last always finds its own history legal, and wins nothing."""
    seen = []

    def copycat(history):
        seen.append(tuple(history))
        return next(x for x in (*history[-1:], *range(7)) if history.count(x) < 6)

    game = ma.ConnectFour(6, torch.device("cpu"))
    centre = lambda obs, legal: game.column(torch.full((len(obs),), 3))  # noqa: E731
    score = tournament.match_against_search(game, centre, copycat)
    assert len(score) == 6 and () in seen and (3,) in seen and (0, 3) in seen


def test_the_solver_knows_what_is_known():
    """Only the centre wins on the empty board; a win that is there is a right move; a single threat must be blocked."""
    pytest.importorskip("bitbully", reason="optional package bitbully is not installed")
    assert tournament.solved(boards(""))[0].tolist() == [-1, -1, 0, 1, 0, -1, -1]
    positions = tournament.positions(tournament.random_player(torch.Generator().manual_seed(0)), 5)[-40:]
    values, wins = tournament.solved(positions), tournament.winning_columns(positions)
    assert (values[wins] == 1).all() and wins.any()
    assert (values.isnan() == (positions.sum(1)[:, None] >> 7 * torch.arange(7) + 5 & 1 > 0)).all()
    values = tournament.solved(boards("012131"))[0]
    assert (values[[0, 2, 3, 4, 5, 6]] == -1).all()


@pytest.mark.parametrize("flags", [["--games", "0"], ["--seed", "-1"], ["--seed", str(2**64)]])
def test_games_and_seeds_that_cannot_be_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        tournament.main(["run", "random", *flags])
    assert stop.value.code == 2 and "--games must be 1 or more" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitbully", None)
    with pytest.raises(SystemExit) as stop:
        tournament.main([str(run), "solver", "--games", "2"])
    assert stop.value.code == 2 and "bitbully" in capsys.readouterr().err
