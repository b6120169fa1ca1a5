"""How strong is a policy of self-play? Games of ppo_multiagent.py's Connect Four, and positions with a known answer.

    python benchmark/tournament.py RUN random                   # games against random play, every other one begun
    python benchmark/tournament.py RUN mcts-50 --games 200      # open_spiel's tree search, 50 simulations a move
    python benchmark/tournament.py RUN OTHER_RUN --games 400    # both sample their moves
    python benchmark/tournament.py RUN pool                     # all snapshots: mean scores, Elo ratings, elo.png
    python benchmark/tournament.py RUN one-ply                  # wins taken, threats blocked, mirror images
    python benchmark/tournament.py RUN solver                   # right moves on critical positions; needs bitbully

RUN is a run folder or a checkpoint. The policy plays its likeliest move, unless said otherwise. Prints one line of
JSON; a score is 1 for a game won and 1/2 for one drawn. open_spiel is in tests/requirements.txt, bitbully (AGPL: for
measuring only) in benchmark/requirements.txt.
"""

import argparse
import copy
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ppo_multiagent as ma  # noqa: E402

CPU, COLUMNS = torch.device("cpu"), 7 * torch.arange(7)  # the lowest bit of each column: see ma.ConnectFour


# ---- games -----------------------------------------------------------------------------------------------------------


def player(team, generator=None):
    """A player for `match`: samples of the team's policy, or without generator its likeliest moves."""

    def move(obs, legal):
        noise = ma.gumbel(len(obs), 1, team.action_dim, generator=generator) if generator else 0.0
        return team.act(obs[:, None], legal[:, None], noise)[:, 0]

    return move


def random_player(generator):
    return lambda obs, legal: torch.multinomial(legal.float(), 1, generator=generator)[:, 0]


@torch.no_grad()
def scores(game, moves):
    """Play one game on each board; the first player begins on every other one. moves(mine, playing) gives all moves
    (N,) of a ply, where mine tells on which boards it is the first player's turn, and playing which games still go on.
    Returns the first player's scores (N,): won 1, drawn 1/2, lost 0."""
    N = game.num_envs
    mine, playing, score = torch.arange(N) % 2 == 0, torch.ones(N, dtype=torch.bool), torch.full((N,), 0.5)
    game.restart(playing)
    while playing.any():
        won, over = game.play(moves(mine, playing))
        score += won * playing * torch.where(mine, 0.5, -0.5)
        mine, playing = ~mine, playing & ~over
        game.restart(over)  # it goes on, but no longer counts
    return score


def match(game, first, second):
    """Scores of `first` against `second`: functions of the obs (n, D) and legal (n, A) of their boards."""

    def moves(mine, playing):
        (obs, legal), move = game.view(), torch.zeros(len(mine), dtype=torch.long)
        for i, mover in enumerate((first, second) if mine[0] else (second, first)):
            move[i::2] = mover(obs[i::2], legal[i::2])
        return move

    return scores(game, moves)


def mcts(simulations, seed):
    """open_spiel's Monte Carlo tree search with one random playout per simulation, as a function of the columns played
    so far."""
    import pyspiel

    game = pyspiel.load_game("connect_four")
    uct, megabytes, solve, verbose = 2.0, 100, False, False
    evaluator = pyspiel.RandomRolloutEvaluator(1, seed)
    bot = pyspiel.MCTSBot(game, evaluator, uct, simulations, megabytes, solve, seed, verbose)

    def column(history):
        state = game.new_initial_state()
        for played in history:
            state.apply_action(played)
        return bot.step(state)

    return column


def match_against_search(game, me, search):
    """Scores of a player, which gets all boards, against a function of the columns played so far."""
    histories = [[] for _ in range(game.num_envs)]

    def moves(mine, playing):
        column = game.column(me(*game.view()))
        for n in (playing & ~mine).nonzero()[:, 0].tolist():
            column[n] = search(histories[n])
        for n, played in enumerate(column.tolist()):
            histories[n].append(played)
        return game.column(column)  # the way back is the same

    return scores(game, moves)


def elo(score, games):
    """Elo ratings (K,) of K players from a matrix of mean scores (K, K), `games` a pair: the Bradley-Terry model,
    P(i beats j) = p_i / (p_i + p_j), fitted by minorisation-maximisation (Hunter 2004, eq. 3). A draw is half a win;
    one more, imagined draw a pair keeps an unbeaten player's rating finite. The first player's rating is 0."""
    wins = (score * games + 0.5).fill_diagonal_(0).sum(1).double()
    n, p = torch.full_like(score, games + 1).fill_diagonal_(0).double(), torch.ones(len(score)).double()
    for _ in range(1000):
        p = wins / (n / (p[:, None] + p)).sum(1)
    return 400 * (p / p[0]).log10()


def rate_pool(run, team, game, generator):
    """All snapshots and the policy itself against each other, sampling their moves: the policy's mean score against
    each snapshot, and everyone's Elo rating; elo.png in the run folder."""
    import matplotlib.figure

    checkpoint = ma.load_checkpoint(run)
    snapshots = checkpoint["adapted"]["snapshots"]
    teams = [*(copy.deepcopy(team) for _ in snapshots), team]
    for earlier, snapshot in zip(teams, snapshots):
        earlier.actor.load_state_dict(snapshot["actor"])
    score = torch.full((len(teams), len(teams)), 0.5)
    for i in range(len(teams)):
        for j in range(i):
            score[i, j] = match(game, player(teams[i], generator), player(teams[j], generator)).mean()
            score[j, i] = 1 - score[i, j]
    steps = [x["global_step"] for x in snapshots] + [checkpoint["global_step"]]
    ratings = elo(score, game.num_envs).tolist()
    figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, ratings, marker="o")
    axes.set(xlabel="learner moves", ylabel="Elo (first snapshot: 0)", title="connect_four, ppo_multiagent.py")
    figure.savefig((run if run.is_dir() else run.parent) / "elo.png", dpi=120)
    return {"returns": score[-1, :-1].tolist(), "global_step": steps, "elo": [round(x, 1) for x in ratings]}


# ---- positions with a known answer -----------------------------------------------------------------------------------


def game_at(boards):
    game = ma.ConnectFour(len(boards), CPU)
    game.boards.copy_(boards)
    return game


def positions(player, games):
    """The different positions (n, 2) that come up in games of a player against itself, as ConnectFour.boards."""
    game, seen = ma.ConnectFour(games, CPU), []

    def moves(mine, playing):
        seen.append(game.boards[playing])
        return player(*game.view())

    scores(game, moves)
    return torch.cat(seen).unique(dim=0)


def legal_columns(boards):
    """Those whose sixth cell is empty, (n, 7)."""
    return (boards.sum(1, keepdim=True) >> COLUMNS + 5 & 1) == 0


def winning_columns(boards):
    """Where the side to move wins at once, (n, 7). Without a view, ConnectFour mirrors nothing."""
    wins = [game_at(boards).play(torch.full((len(boards),), column))[0] > 0 for column in range(7)]
    return torch.stack(wins, 1) & legal_columns(boards)


def likeliest_columns(team, boards):
    game = game_at(boards)
    with torch.no_grad():
        return game.column(player(team)(*game.view()))


def one_ply(team, boards):
    """How often the likeliest move takes a win that is there, and else blocks the one threat that is there; how often a
    mirrored position gets the mirrored move; and what uniformly random moves would reach."""
    win, threat, legal = winning_columns(boards), winning_columns(boards.flip(1)), legal_columns(boards)
    column = likeliest_columns(team, boards)
    chosen = torch.nn.functional.one_hot(column, 7).bool()
    can_win, must_block = win.any(1), ~win.any(1) & (threat.sum(1) == 1)
    mirrored = ((boards[..., None] >> COLUMNS & 127).flip(-1) << COLUMNS).sum(-1)
    lopsided = (mirrored != boards).any(1)
    same = likeliest_columns(team, mirrored) == 6 - column
    share = lambda answer, of: (answer & chosen).any(1)[of].float().mean().item()  # noqa: E731
    chance = lambda answer, of: (answer.sum(1) / legal.sum(1))[of].mean().item()  # noqa: E731
    return {
        "wins_taken": share(win, can_win), "of": int(can_win.sum()), "wins_by_chance": chance(win, can_win),
        "blocks": share(threat, must_block), "out_of": int(must_block.sum()),
        "blocks_by_chance": chance(threat, must_block), "mirrored": same[lopsided].float().mean().item(),
    }  # fmt: skip


def solved(boards):
    """The value of each move (n, 7) under perfect play, from the mover's side: 1 won, 0 drawn, -1 lost, nan illegal."""
    import bitbully

    agent, values = bitbully.BitBully(), torch.full((len(boards), 7), torch.nan)
    for n, (mine, theirs) in enumerate(boards.tolist()):
        # The side that began the game has as many stones as the other if it is to move, and is 1 in bitbully's cells.
        first, second = (mine, theirs) if mine.bit_count() == theirs.bit_count() else (theirs, mine)
        columns = [range(bottom, bottom + 6) for bottom in COLUMNS.tolist()]
        cells = [[(first >> cell & 1) + 2 * (second >> cell & 1) for cell in column] for column in columns]
        for column, score in agent.score_all_moves(bitbully.Board(cells)).items():
            values[n, column] = (score > 0) - (score < 0)
    return values


def right_moves(team, boards):
    """The share of critical positions (some legal move changes the game's value) where the likeliest move keeps it."""
    values, legal = solved(boards), legal_columns(boards)
    right = values == values.nan_to_num(-2).amax(1, keepdim=True)
    critical = (right.sum(1) < legal.sum(1)).nonzero()[:, 0]
    hit = right.gather(1, likeliest_columns(team, boards)[:, None])[:, 0]
    return {
        "right_moves": hit[critical].float().mean().item(), "critical": len(critical), "positions": len(boards),
        "by_chance": (right.sum(1) / legal.sum(1))[critical].mean().item(),
    }  # fmt: skip


# ---- entry -----------------------------------------------------------------------------------------------------------


def load_team(run):
    """The team of a checkpoint, and its step. Raises ma.UserError."""
    args = ma.parse_args(["--evaluate", str(run), "--env-id", "connect_four"])
    team = ma.Team(ma.make_world(args, args.num_envs, CPU), args)
    return team, ma.load_checkpoint(run, agent=team)["global_step"]


def rate(run, opponent, games, seed):
    team, step = load_team(run)
    generator, game = torch.Generator().manual_seed(seed), ma.ConnectFour(games, CPU)
    result = {"run": str(run), "global_step": step, "opponent": opponent}
    randomly = random_player(generator)
    if opponent == "pool":
        return result | rate_pool(run, team, game, generator)
    if opponent == "one-ply":
        own = positions(player(team, generator), games)
        return result | {"own": one_ply(team, own), "random": one_ply(team, positions(randomly, games))}
    if opponent == "solver":
        both = torch.cat([positions(player(team, generator), games), positions(randomly, games)])
        chosen = both[torch.randperm(len(both), generator=generator)[:1000]]
        return result | right_moves(team, chosen)
    if opponent == "random":
        returns = match(game, player(team), randomly)
    elif re.fullmatch(r"mcts-[1-9]\d*", opponent):
        returns = match_against_search(game, player(team), mcts(int(opponent[5:]), seed))
    else:
        other, _ = load_team(opponent)
        returns = match(game, player(team, generator), player(other, generator))
    return result | {"mean": returns.mean().item(), "games": games}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("opponent", help="random, mcts-N, pool, one-ply, solver, or another run")
    parser.add_argument("--games", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.games < 1 or not 0 <= args.seed < 2**63:
        parser.error("--games must be 1 or more, and --seed 0 or more")
    torch.set_num_threads(1)
    try:
        print(json.dumps(rate(args.run, args.opponent, args.games, args.seed)))
    except ma.UserError as error:
        parser.exit(2, f"tournament.py: {error}\n")
    except ImportError as error:
        parser.exit(2, f"tournament.py: {error}: see the top of this file for what to install\n")


if __name__ == "__main__":
    main()
