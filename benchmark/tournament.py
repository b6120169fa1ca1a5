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

CPU = torch.device("cpu")


# ---- games -----------------------------------------------------------------------------------------------------------


def player(team, generator=None):
    """A player for `match`: samples of the team's policy, or without generator its likeliest moves."""

    def move(obs, legal):
        noise = ma.gumbel(len(obs), 1, team.action_dim, generator=generator).to(obs.device) if generator else 0.0
        return team.act(obs[:, None], legal[:, None], noise)[:, 0]

    return move


def random_player(generator):
    return lambda obs, legal: torch.multinomial(legal.float().cpu(), 1, generator=generator)[:, 0]


@torch.no_grad()
def match(game, first, second):
    """Play one game on each board; `first` begins on every other one. Players are functions of obs (n, D) and legal
    (n, A). Returns first's scores (N,): won 1, drawn 1/2, lost 0."""
    N = game.num_envs
    playing, score = torch.ones(N, dtype=torch.bool, device=game.device), torch.full((N,), 0.5)
    game.restart(playing)
    for ply in range(game.max_plies):
        (obs, legal), move = game.view(), torch.zeros(N, dtype=torch.long, device=game.device)
        for i, mover in enumerate((first, second) if ply % 2 == 0 else (second, first)):
            move[i::2] = mover(obs[i::2], legal[i::2]).to(move.device)
        won, over = game.play(move)
        won = (won * playing).cpu()
        won[1 - ply % 2 :: 2] *= -1  # these plies were second's
        score += won / 2
        playing &= ~over
        game.restart(over)  # it goes on, but no longer counts
        if not playing.any():
            break
    return score


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


@torch.no_grad()
def match_against_search(game, me, search):
    """As match, against a function of the columns played so far. Returns scores (N,)."""
    N, score = game.num_envs, torch.full((game.num_envs,), 0.5)
    playing, histories = torch.ones(N, dtype=torch.bool), [[] for _ in range(N)]
    game.restart(playing)
    for ply in range(game.max_plies):
        column = game.column(me(*game.view()))
        mine = (torch.arange(N) + ply) % 2 == 0
        for n in (playing & ~mine).nonzero()[:, 0].tolist():
            column[n] = search(histories[n])
        for n, played in enumerate(column.tolist()):
            histories[n].append(played)
        won, over = game.play(game.column(column))  # the way back is the same
        score += won * playing * torch.where(mine, 0.5, -0.5)
        playing &= ~over
        game.restart(over)
        if not playing.any():
            break
    return score


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
    snapshots, players = checkpoint["adapted"]["snapshots"], [team]
    for snapshot in reversed(snapshots):
        players.insert(0, copy.deepcopy(team))
        players[0].actor.load_state_dict(snapshot["actor"])
    score = torch.full((len(players), len(players)), 0.5)
    for i in range(len(players)):
        for j in range(i):
            score[i, j] = match(game, *(player(players[k], generator) for k in (i, j))).mean()
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


@torch.no_grad()
def positions(player, games=500):
    """The different positions (n, 2) that come up in games of a player against itself, as ConnectFour.boards."""
    game, seen = ma.ConnectFour(games, CPU), []
    playing = torch.ones(games, dtype=torch.bool)
    while playing.any():
        seen.append(game.boards[playing])
        _, over = game.play(player(*game.view()))
        playing &= ~over
        game.restart(over)
    return torch.cat(seen).unique(dim=0)


def winning_columns(boards):
    """Where the side to move wins at once, (n, 7)."""
    game, wins = game_at(boards), torch.zeros(len(boards), 7, dtype=torch.bool)
    for column in range(7):
        game.boards.copy_(boards)
        (_, legal), action = game.view(), game.column(torch.full((len(boards),), column))
        free = legal.gather(1, action[:, None])[:, 0]
        wins[:, column] = (game.play(action)[0] > 0) & free
    return wins


def likeliest_columns(team, boards):
    game = game_at(boards)
    with torch.no_grad():
        return game.column(player(team)(*game.view()))


def one_ply(team, boards):
    """How often the likeliest move takes a win that is there, and else blocks the one threat that is there; how often a
    mirrored position gets the mirrored move; and what uniformly random moves would reach."""
    win, threat = winning_columns(boards), winning_columns(boards.flip(1))
    legal = torch.stack([((boards.sum(1) >> 7 * column + 5) & 1) == 0 for column in range(7)], 1)
    chosen = torch.nn.functional.one_hot(likeliest_columns(team, boards), 7).bool()
    can_win, must_block = win.any(1), ~win.any(1) & (threat.sum(1) == 1)
    mirrored = ((boards[..., None] >> 7 * torch.arange(7) & 127).flip(-1) << 7 * torch.arange(7)).sum(-1)
    lopsided = (mirrored != boards).any(1)
    same = likeliest_columns(team, mirrored) == 6 - likeliest_columns(team, boards)
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
        begins = mine.bit_count() == theirs.bit_count()  # the side to move is the one that began
        cells = [[0] * 6 for _ in range(7)]  # columns from the bottom; 1: the side that began the game
        for number, stones in ((1, mine if begins else theirs), (2, theirs if begins else mine)):
            for column in range(7):
                for row in range(6):
                    cells[column][row] += number * (stones >> 7 * column + row & 1)
        board = bitbully.Board(cells)
        for column, score in agent.score_all_moves(board).items():
            values[n, column] = (score > 0) - (score < 0)
    return values


def right_moves(team, boards):
    """The share of critical positions (some legal move changes the game's value) where the likeliest move keeps it."""
    values = solved(boards)
    legal = ~values.isnan()
    best = values.nan_to_num(-2).amax(1, keepdim=True)
    right = values == best
    critical = (right.sum(1) < legal.sum(1)).nonzero()[:, 0]
    chosen = likeliest_columns(team, boards)
    hit = right.gather(1, chosen[:, None])[:, 0]
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
