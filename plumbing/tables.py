"""How the numbers of stage 07 are shown, and the paper's Table 1 beside them."""

from typing import NamedTuple


class Metric(NamedTuple):
    column: str
    better: str = "higher"
    decimals: int = 3
    times: int = 1  # shown times this

    def text(self, value, sign=""):
        return "-" if value is None else f"{value * self.times:{sign}.{self.decimals}f}"


METRICS = {
    "fd_passt": Metric("FD_PaSST", "lower", 2), "fd": Metric("FD", "lower", 2),
    "kl_panns": Metric("KL_PANNs", "lower", 2), "kl_passt": Metric("KL_PaSST", "lower", 2),
    "kl": Metric("KL", "lower", 2), "is": Metric("IS", "higher", 2), "ib": Metric("IB x100", "higher", 2, 100),
    "clap": Metric("CLAP x100", "higher", 2, 100), "desync_s": Metric("DeSync s", "lower"),
    "p_good": Metric("P(Good)"), "win_rate": Metric("wins"),
    "audiobox_pq": Metric("audiobox PQ", "higher", 2), "audiobox_pc": Metric("audiobox PC", "lower", 2),
    "audiobox_ce": Metric("audiobox CE", "higher", 2), "audiobox_cu": Metric("audiobox CU", "higher", 2),
    "judge_semantic": Metric("judge: semantic"), "judge_sync_s": Metric("judge: sync s", "lower", 4),
    "judge_aesthetic": Metric("judge: aesthetic"),
    "oracle_semantic": Metric("oracle: semantic"), "oracle_sync_s": Metric("oracle: sync s", "lower", 4),
    "oracle_floor_db": Metric("oracle: floor dB", "lower", 2), "oracle_aesthetic": Metric("oracle: aesthetic"),
}  # fmt: skip
PAPER_COLUMNS = ("fd_passt", "kl_panns", "kl_passt", "is", "ib", "desync_s")
PAPER = {  # Table 1, VGGSound test
    "Seeing&Hearing": (219.01, 2.26, 2.30, 8.58, 33.99, 1.20), "V-AURA": (218.50, 2.42, 2.07, 10.08, 27.64, 0.65),
    "FoleyCrafter": (140.09, 2.30, 2.23, 15.68, 25.68, 1.23), "V2A-Mapper": (84.57, 2.69, 2.56, 12.47, 22.58, 1.23),
    "ThinkSound": (54.92, 1.32, 1.52, 16.03, 34.13, 0.46), "Frieren": (106.10, 2.73, 2.86, 12.25, 22.78, 0.85),
    "Frieren-DDPO": (75.41, 2.58, 2.61, 13.12, 23.19, 0.65), "Frieren-DPO": (69.98, 2.55, 2.63, 13.98, 24.11, 0.62),
    "MMAudio": (60.60, 1.65, 1.40, 17.40, 33.22, 0.44), "MMAudio-DDPO": (54.81, 1.42, 1.36, 18.34, 33.89, 0.39),
    "MMAudio-DPO": (51.38, 1.38, 1.34, 19.21, 34.08, 0.35),
}  # fmt: skip
TOLERANCE = "tolerance: a repeated evaluation of one MMAudio model drifted by 0.69 FD_PaSST and 0.006 s DeSync"


def describe(metrics):
    """{name: Metric} in the table's order; one that a scorer of the user's brings is shown as it comes."""
    metrics = dict.fromkeys(metrics)
    order = [*(name for name in METRICS if name in metrics), *(name for name in metrics if name not in METRICS)]
    return {name: METRICS.get(name, Metric(name)) for name in order}


def print_table(results, systems, against="base"):
    """Values, then differences to one of them with 95 % intervals; better and worse mark intervals that exclude 0."""
    cell = {(row["metric"], row["system"]): row for row in results}
    metrics = describe(row["metric"] for row in results)
    print("\n" + f"{'':<18}" + "".join(f"{s[:14]:>15}" for s in systems))
    for name, metric in metrics.items():
        values = [metric.text(cell[name, s]["value"]) if (name, s) in cell else "" for s in systems]
        label = f"{metric.column} {'^' if metric.better == 'higher' else 'v'}"
        print(f"{label:<18}" + "".join(f"{v:>15}" for v in values))
    others = [s for s in systems if s not in (against, "ground_truth")]
    if against in systems and others:
        print(f"\n{f'minus {against[:14]}, 95 % interval':<29}" + "".join(f"{s[:24]:>36}" for s in others))
        for name, metric in metrics.items():
            text = f"{metric.column:<29}"
            for row in (cell.get((name, s)) for s in others):
                if row is None or row["diff"] is None:
                    text += " " * 36
                    continue
                diff, low, high = (metric.text(row[key], "+") for key in ("diff", "diff_low", "diff_high"))
                text += f"{diff} [{low}, {high}] {row['verdict'] or '':<6}".rjust(36)
            print(text)
        print("intervals over clips, one training seed: another seed may move a policy by more than they are wide")


def hacked(results):
    """A line for each system that gains on AudioScore and loses by who is no part of it: a judge, the toy's oracle."""
    said = {}
    for row in results:
        said.setdefault(row["system"], {}).setdefault(row["verdict"], []).append(row["metric"])
    for system, metrics in said.items():
        lost = [m for m in metrics.get("worse", ()) if m.startswith(("audiobox_", "judge_", "oracle_"))]
        if lost and "p_good" in metrics.get("better", ()):
            yield f"warning: {system} gains on AudioScore and loses on {', '.join(lost)}: is it gaming its reward?"


def paper_twin(system, run_json):
    """The row of Table 1 that a system repeats: base, flow_dpo and ddpo of the two models that the paper tunes, and any
    system named like a row (mmaudio=DIR)."""
    family = {"mmaudio:large_44k": "MMAudio", "frieren": "Frieren"}.get(run_json["model"])
    if family and system in ("base", "flow_dpo", "ddpo"):
        return family + {"base": "", "flow_dpo": "-DPO", "ddpo": "-DDPO"}[system]
    plain = {"".join(filter(str.isalnum, name)).lower(): name for name in PAPER}
    return plain.get("".join(filter(str.isalnum, system)).lower())


def table_1(run_json, results, systems):
    """The paper's rows, then ours, then each of ours minus the paper's own: [(label, six texts)], and a remark. In the
    toy world only MMAudio's rows, without ours: only the signs of the differences compare."""
    if "scorers" in run_json:  # not the paper's
        rows = [(name, [f"{x:.2f}" for x in row]) for name, row in PAPER.items() if name.startswith("MMAudio")]
        return rows, "another world and other scorers: compare the signs of the differences, not the numbers"
    value = {(row["system"], row["metric"]): row["value"] for row in results}
    rows = [(name, [f"{x:.2f}" for x in row]) for name, row in PAPER.items()]
    for system in (s for s in systems if s != "ground_truth"):
        ours = [value.get((system, metric)) for metric in PAPER_COLUMNS]
        rows.append((f"here: {system}", [METRICS[m].text(x) for m, x in zip(PAPER_COLUMNS, ours)]))
        if twin := paper_twin(system, run_json):
            paper = [y / METRICS[m].times for m, y in zip(PAPER_COLUMNS, PAPER[twin])]
            drift = [None if x is None else x - y for x, y in zip(ours, paper)]
            texts = [METRICS[m].text(x, "+") for m, x in zip(PAPER_COLUMNS, drift)]
            rows.append((f"  minus the paper's {twin}", texts))
    return rows, TOLERANCE


def print_table_1(rows, remark):
    print("\nthe paper (Table 1, VGGSound test)" + "".join(f"{METRICS[m].column:>11}" for m in PAPER_COLUMNS))
    for name, texts in rows:
        print(f"{name[:34]:<34}" + "".join(f"{text:>11}" for text in texts))
    print(f"({remark})")
