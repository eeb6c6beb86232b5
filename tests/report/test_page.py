"""The report as a file (self-contained, hostile text inert) and in a real browser."""

import dataclasses
import functools
import html
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from infalign.errors import InputError, StorageError
from infalign.estimators import mean_estimate
from infalign.evaluation.compare import compare
from infalign.evaluation.frontier import frontier
from infalign.evaluation.measure import measure
from infalign.evaluation.results import Band, Measured, OverN
from infalign.procedures import BestOfN, Standard, WorstOfN
from infalign.report import curves, figures
from infalign.report.markdown import render_markdown
from infalign.report.page import ReportData, markdown_table, write_report
from infalign.report.words import cautions, methods_paragraph, percent, verdict, worse_sentence

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

HOSTILE = (
    "</script><img src=x onerror=\"document.title='pwned'\"><b>bold</b> &amp; {{ 7*7 }} \u202eright to left\u202c 🎉"
)
LONG_LINE = "x" * 100_000
PROCEDURES = [Standard(), BestOfN(2), BestOfN(4), WorstOfN(2), WorstOfN(4)]


def method(label, shift, *, num_prompts=60, **options):
    rng = np.random.default_rng(0)
    ref_rewards_PK, rewards_PG = rng.normal(size=(num_prompts, 8)), shift + rng.normal(size=(num_prompts, 8))
    log_ratios_PG = shift * rewards_PG - shift**2 / 2
    gold = {"gold": (rewards_PG - shift, ref_rewards_PK)}
    return measure(label, rewards_PG, ref_rewards_PK, log_ratios_PG, PROCEDURES, judges=gold, **options)


@functools.cache
def two_methods():
    aware = dataclasses.replace(method("aware", 0.8), kl=method("plain", 0.5).kl)
    return aware, method("plain", 0.5)


def sweep():
    """Three checkpoints of one training, and another method."""
    steps = [dataclasses.replace(method(f"a step {s}", s / 40), series="a", step=s) for s in (10, 20, 40)]
    return [*steps, method("b", 0.4)]


def candidate(text, reward, *, chosen):
    return {
        "text": text,
        "reward": reward,
        "calibrated_reward": 1 / (1 + np.exp(-reward)),
        "finish_reason": "stop",
        "chosen": chosen,
    }


def report_data(**changes):
    aware, plain = two_methods()
    samples = [
        {
            "prompt": f"prompt number {i}",
            "methods": {
                "reference": {"candidates": [candidate(f"reference {i}", 0.0, chosen=True)]},
                "aware": {
                    "candidates": [
                        candidate(f"needle {i}", 1.0 if i % 3 else -1.0, chosen=True),
                        candidate("second best", -2.0, chosen=False),
                    ]
                },
                "plain": {"candidates": [candidate(f"plain {i}", 0.0, chosen=True)]},
            },
        }
        for i in range(30)
    ]
    samples[0]["prompt"] = [{"role": "user", "content": HOSTILE}]
    samples[0]["methods"]["aware"]["candidates"][0]["text"] = HOSTILE
    samples[1]["methods"]["aware"]["candidates"][0]["text"] = LONG_LINE
    rng = np.random.default_rng(1)
    fields = {
        "results": [aware, plain],
        "procedure": "Best-of-4",
        "title": f"Title {HOSTILE}",
        "baseline": "plain",
        "plan": {"best": {"kl": 0.15, "beta": 0.4}},
        "settings": {"policy": {"path": HOSTILE}, "seed": 0},
        "versions": {"infalign": "0.1.0"},
        "samples": samples,
        "curves": {
            "aware": [{"step": s, "kl": 0.01 * s, "calibrated_reward": 0.5, "beta": 0.3} for s in range(100)],
            "plain": [{"step": s, "kl": 0.01 * s} for s in range(10)],
        },
        "rewards": {
            label: {"rewards": rng.normal(size=50).tolist(), "calibrated_rewards": rng.uniform(size=50).tolist()}
            for label in ("reference", "aware", "plain")
        },
    }
    return ReportData(**{**fields, **changes})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "sub" / "report.html", report_data())


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, as a browser would open them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


class TestFile:
    def test_names_no_outside_resource(self, page):
        for tag, attributes in Tags(page.read_text()).found:
            assert "src" not in attributes, tag
            href = attributes.get("href", "#")
            assert href.startswith("#") or (tag, href) == ("link", "data:,")
        assert "default-src 'none'" in page.read_text()

    def test_hostile_text_is_never_markup(self, page):
        text = page.read_text()
        tags = [tag for tag, _ in Tags(text).found]
        assert "img" not in tags
        assert "b" not in tags
        assert "<img" not in re.sub(r"(?s)<script>.*?</script>", "", text)
        assert "{{ 7*7 }}" in text  # not run as a template either

    def test_every_section_has_a_heading_and_every_control_a_label(self, page):
        found = Tags(page.read_text()).found
        ids = [attributes["id"] for _, attributes in found if "id" in attributes]
        assert len(ids) == len(set(ids))
        labelled = {attributes["for"] for tag, attributes in found if tag == "label"}
        for tag, attributes in found:
            if tag in ("select", "input"):
                assert attributes["id"] in labelled
            for reference in ("aria-labelledby", "aria-describedby"):
                assert attributes.get(reference, ids[0]) in ids
            if attributes.get("href", "").startswith("#"):
                assert attributes["href"][1:] in ids
            if attributes.get("role") == "img":
                assert attributes["aria-label"]
        assert [tag for tag, _ in found].count("h1") == 1

    def test_says_what_was_found(self, page):
        text = page.read_text()
        aware, plain = two_methods()
        assert "With Best-of-4, aware beats the reference used the same way" in text
        assert compare([aware, plain], baseline="plain")[2].sentence in text
        assert "Judged by other rewards" in text
        assert percent(aware.of("Best-of-4").judged["gold"]) in text
        assert f"{100 * aware.of('Best-of-4').win_rate.estimate:.1f}%" in text

    def test_says_what_the_mean_may_hide(self, page, tmp_path):
        text = page.read_text()
        assert worse_sentence(two_methods()[0]) in text
        warned = write_report(tmp_path / "a.html", report_data(warnings=[f"mind {HOSTILE}"])).read_text()
        assert "mind &lt;/script&gt;" in warned
        assert "img" not in [tag for tag, _ in Tags(warned).found]

    def test_a_sweep_is_one_curve_by_both_rewards(self, tmp_path):
        data = ReportData(sweep(), "Best-of-4")
        text = write_report(tmp_path / "a.html", data).read_text()
        assert "from the reference on. Solid: judged by reward" in text
        look = figures.styles_of(data.results)
        assert len({look[f"a step {step}"] for step in (10, 20, 40)}) == 1
        figure = curves.over_kl_figure(data.results, "Best-of-4", look, ["gold"])
        assert [(trace["name"], len(trace["x"])) for trace in figure["data"]] == [
            ("a, by reward", 4),
            ("a, by gold", 4),
        ]
        assert [trace["y"][0] for trace in figure["data"]] == [0.5, 0.5]
        over_n = curves.win_rate_over_n_figure(data.results, "best-of-n", look)
        assert [trace["name"] for trace in over_n["data"] if "name" in trace] == ["a step 40", "b"]

    def test_markdown_says_the_same(self):
        text = render_markdown(report_data())
        aware, plain = two_methods()
        assert "With Best-of-4, aware beats the reference used the same way" in text
        assert percent(aware.of("Best-of-4").judged["gold"]) in text
        assert worse_sentence(plain) in text
        assert "<img" not in text.replace("\\<", "")

    def test_two_writes_are_equal(self, page, tmp_path):
        assert write_report(tmp_path / "again.html", report_data()).read_bytes() == page.read_bytes()

    def test_little_is_enough(self, tmp_path):
        text = write_report(tmp_path / "a.html", ReportData([two_methods()[0]], "Best-of-4")).read_text()
        for absent in ("sample-form", 'id="training"', 'id="rewards"'):
            assert absent not in re.sub(r"(?s)<(script|style)>.*?</\1>", "", text)

    def test_one_prompt_has_no_interval_and_says_so(self, tmp_path):
        text = write_report(tmp_path / "a.html", ReportData([method("a", 0.5, num_prompts=1)], "Standard")).read_text()
        assert "no interval" in text

    def test_samples_are_cut_to_size_and_counted(self, tmp_path):
        big = [
            {"prompt": "p", "methods": {"aware": {"candidates": [candidate("y" * 1_000_000, 0.0, chosen=True)]}}}
            for _ in range(9)
        ]
        path = write_report(tmp_path / "a.html", report_data(samples=big))
        assert path.stat().st_size < 10_000_000
        assert "7 more prompts were left out" in path.read_text()

    def test_from_stored_json(self, tmp_path):
        data = report_data()
        stored = {**dataclasses.asdict(data), "results": [result.to_dict() for result in data.results]}
        again = ReportData.from_dict(json.loads(json.dumps(stored)))
        assert (
            write_report(tmp_path / "b.html", again).read_bytes()
            == write_report(tmp_path / "a.html", data).read_bytes()
        )
        with pytest.raises(InputError, match="not the data of a report"):
            ReportData.from_dict({"procedure": "Best-of-4"})

    def test_refusals(self, tmp_path):
        with pytest.raises(InputError, match="no result"):
            write_report(tmp_path / "a.html", report_data(results=[]))
        with pytest.raises(InputError, match="not measured under Best-of-64"):
            write_report(tmp_path / "a.html", report_data(procedure="Best-of-64"))
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot write the report"):
            write_report(tmp_path / "file" / "a.html", report_data())


class TestFigures:
    def test_plotly_knows_every_property(self):
        go = pytest.importorskip("plotly.graph_objects")
        aware, plain = two_methods()
        look = figures.styles(["aware", "plain"])
        data = report_data()
        built = [
            figures.frontier_figure(frontier([aware, plain], "Best-of-4"), look),
            curves.win_rate_over_n_figure([aware, plain], "best-of-n", look),
            curves.win_rate_over_n_figure([aware, plain], "worst-of-n", look),
            curves.win_rate_over_n_figure([aware, plain], "best-of-n", look, judge="gold"),
            curves.over_kl_figure(sweep(), "Best-of-4", figures.styles_of(sweep()), ["gold"]),
            curves.training_figure(data.curves, look, kl_target=0.2),
            figures.histogram_figure({"reference": [0.1, 0.9], "aware": [0.5]}, look, calibrated=True, title="C"),
            figures.histogram_figure({"reference": [1.0, 1.0]}, look, calibrated=False, title="reward"),
        ]
        for figure in built:
            assert figure is not None
            go.Figure(figure)  # raises on an unknown or ill-typed property
            json.dumps(figure, allow_nan=False)

    def test_frontier_holds_the_points(self):
        aware, plain = two_methods()
        figure = figures.frontier_figure(frontier([aware, plain], "Best-of-4"), figures.styles(["aware", "plain"]))
        limit, first, _ = figure["data"]
        assert limit["y"][0] == 0.5
        assert (first["x"], first["y"]) == ([aware.kl.estimate], [aware.of("Best-of-4").win_rate.estimate])
        assert first["y"][0] + first["error_y"]["array"][0] == pytest.approx(aware.of("Best-of-4").win_rate.high)

    def test_absent_data_gives_no_figure(self):
        look = figures.styles(["a"])
        assert curves.training_figure({"a": [{"step": 1, "loss": 2.0}]}, look) is None
        assert figures.histogram_figure({"a": [float("nan")]}, look, calibrated=False, title="") is None
        short = {family: OverN([1, 2], Band(*[[0.5, 0.5]] * 3), {}) for family in ("best-of-n", "worst-of-n")}
        few = dataclasses.replace(two_methods()[0], over_n=short)
        assert curves.win_rate_over_n_figure([few], "best-of-n", figures.styles(["aware"])) is None

    def test_histograms_are_densities(self):
        values = np.random.default_rng(0).normal(size=500).tolist()
        figure = figures.histogram_figure({"a": values}, figures.styles(["a"]), calibrated=False, title="reward")
        (trace,) = figure["data"]
        assert np.sum(np.diff(trace["x"]) * np.array(trace["y"][:-1])) == pytest.approx(1)

    def test_a_constant_curve_stays_constant(self):
        records = [{"step": step, "beta": 0.3} for step in range(100)]
        (curve,) = curves.training_figure({"a": records}, figures.styles(["a"]))["data"]
        assert set(curve["y"]) == {0.3}, "no rounding for an axis to magnify"

    def test_names_are_text(self):
        assert figures.styles(["<b>"])["<b>"]
        point = dataclasses.replace(two_methods()[0], label="<b>x</b>")
        figure = figures.frontier_figure(frontier([point], "Standard"), figures.styles(["<b>x</b>"]))
        assert "<b>x" not in json.dumps([trace["name"] for trace in figure["data"]])

    def test_colours_show_on_both_papers(self):
        def luminance(colour):
            channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
            return float(linear @ [0.2126, 0.7152, 0.0722])

        for style in figures.styles([str(i) for i in range(8)]).values():
            for paper in ("#ffffff", "#1b1f26"):
                low, high = sorted((luminance(style.colour), luminance(paper)))
                assert (high + 0.05) / (low + 0.05) >= 3, (style.colour, paper)

    def test_sixteen_methods_look_different(self):
        looks = figures.styles([str(i) for i in range(16)]).values()
        assert len({(look.colour, look.symbol) for look in looks}) == 16

    def test_png(self, tmp_path):
        renamed = dataclasses.replace(two_methods()[0], label="_costs $5 and x_1$")
        path = figures.save_frontier_png(tmp_path / "f.png", [frontier([renamed], "Best-of-4")], title="5 $ each $")
        assert path.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(InputError, match="nothing to draw"):
            figures.save_frontier_png(tmp_path / "f.png", [])
        with pytest.raises(StorageError, match="cannot write the figure"):
            figures.save_frontier_png(tmp_path / "absent" / "f.png", [frontier([renamed], "Best-of-4")])


class TestWords:
    def test_verdict_is_honest_about_nothing(self):
        same = method("same", 0.0)
        (finding,) = verdict([same], "Best-of-4", [])
        assert not finding.resolved
        assert "not resolved whether same differs from the reference" in finding.sentence

    def test_many_methods_are_many_chances(self):
        # One method at p ≈ 0.03 is resolved alone, and not among ten that differ in nothing.
        rng = np.random.default_rng(0)
        noise = rng.normal(size=60)
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        wins = (0.5 + 0.1 * (noise + 2.2 / np.sqrt(60))).tolist()
        base = method("a", 0.0)
        entry = base.of("Best-of-4")
        edge = dataclasses.replace(entry, win_rate=Measured.of(mean_estimate(wins)))
        one = dataclasses.replace(base, procedures=[edge])
        others = [dataclasses.replace(method(str(i), 0.0), procedures=[entry]) for i in range(9)]
        assert verdict([one], "Best-of-4", [])[0].resolved
        assert not any(finding.resolved for finding in verdict([one, *others], "Best-of-4", []))

    def test_verdict_of_a_worse_model(self):
        (finding,) = verdict([method("worse", -0.8)], "Best-of-4", [])
        assert finding.resolved
        assert "worse loses to the reference" in finding.sentence

    def test_cautions_follow_the_data(self):
        plain = " ".join(cautions([two_methods()[0]]))
        assert "aware, Best-of-4: by gold the win rate is" in plain
        assert "longer" not in plain
        assert "ties" not in plain
        warned = dataclasses.replace(
            two_methods()[0], tie_share=0.2, mean_length=24.0, ref_mean_length=20.0, truncated_share=0.1, num_prompts=12
        )
        text = " ".join(cautions([warned]))
        for part in (
            "20% longer",
            "20% of the pairs are ties",
            "10.0% of the responses were cut off",
            "only 12 prompts",
        ):
            assert part in text

    def test_methods_paragraph_states_sizes(self):
        text = methods_paragraph([two_methods()[0]], {"best": {"kl": 0.5, "beta": 0.2}})
        assert "60 held-out prompts we drew 8 fresh responses" in text
        assert "KL of 0.5 nats (β = 0.2 in theory)" in text

    def test_markdown_table(self):
        aware, plain = two_methods()
        odd = dataclasses.replace(aware, label="a|b\n<i>")
        text = markdown_table([odd, plain], procedures=["Best-of-4"])
        lines = text.splitlines()
        assert lines[0] == "| method | KL, nats | Best-of-4 win rate |"
        assert lines[2].startswith("| a\\|b \\<i\\> |")
        assert all(line.replace("\\|", "").count("|") == 4 for line in lines[:5])
        assert "limit at that KL" in lines[4]


@needs_browser
class TestBrowser:
    @staticmethod
    def dom(path, tmp_path, script=""):
        """The page's DOM after its scripts (and one more) ran, and the browser's console."""
        copy = tmp_path / "page.html"
        copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        done = subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *("--no-first-run", "--window-size=1200,900", "--virtual-time-budget=20000"),
                *(
                    "--enable-logging=stderr",
                    "--host-resolver-rules=MAP * ~NOTFOUND",
                    f"--user-data-dir={tmp_path / 'profile'}",
                ),
                *("--dump-dom", copy.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console

    def test_draws_everything_quietly_and_asks_for_nothing(self, page, tmp_path):
        dom, console = self.dom(page, tmp_path)
        assert 'data-ready="true"' in dom
        assert console == []
        places = dom.count("data-figure=")
        assert places == 8  # frontier, two over N, the same by another reward, training, two of rewards
        assert dom.count('class="main-svg"') >= places
        assert "errorbars" in dom

    def test_a_request_would_be_blocked_and_seen(self, page, tmp_path):
        # The quiet console above means something: the page's own policy stops a request, and the browser says so.
        _, console = self.dom(page, tmp_path, 'fetch("https://example.invalid/").catch(() => {});')
        assert any("Content Security Policy" in line for line in console)

    def test_hostile_text_is_shown_as_text(self, page, tmp_path):
        # Probe what a reader would see: text content, not markup.
        script = """addEventListener("load", () => setTimeout(() => {
          const seen = [...document.querySelectorAll(".text")].map((node) => node.textContent);
          document.body.dataset.probe = JSON.stringify({
            hostile: seen.filter((text) => text.includes("<\\/script><img src=x onerror=")).length,
            marks: seen.some((text) => text.includes("⟨U+202E⟩right to left")),
            longest: Math.max(...seen.map((text) => text.length)),
            images: document.querySelectorAll("img").length,
            title: document.title.startsWith("Title <\\/script>"),
            wide: document.documentElement.scrollWidth <= innerWidth,
          });
        }, 500));"""
        dom, console = self.dom(page, tmp_path, script)
        probe = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
        assert console == []
        assert probe == {"hostile": 2, "marks": True, "longest": 100_000, "images": 0, "title": True, "wide": True}

    def test_search_filters_theme_and_choice_work(self, page, tmp_path):
        script = """addEventListener("load", () => setTimeout(() => {
          const at = (id) => document.getElementById(id);
          const count = () => at("sample-count").textContent;
          const set = (id, value) => {
            at(id).value = value;
            at(id).dispatchEvent(new Event(id === "frontier-choice" ? "change" : "input", { bubbles: true }));
          };
          const seen = { all: count() };
          at("sample-more").click();
          seen.more = count();
          set("sample-search", "NEEDLE 7");
          seen.search = count();
          set("sample-search", "");
          set("sample-outcome", "loss");
          seen.loss = count();
          set("sample-method", "plain");
          seen.plain = count();
          set("sample-outcome", "tie");
          seen.tie = count();
          set("sample-outcome", "");
          set("sample-method", "aware");
          set("sample-quantile", "2");
          seen.quarter = count();
          set("sample-quantile", "0");
          seen.lowest = count();
          set("sample-quantile", "");
          set("sample-order", "worst");
          seen.worst = document.querySelector(".sample h3").textContent;
          const details = document.querySelector(".sample details");
          details.open = true;
          set("frontier-choice", "frontier:Worst-of-4");
          at("theme").click(); at("theme").click();
          setTimeout(() => {
            seen.candidates = details.querySelectorAll(".candidate").length;
            seen.axis = at("frontier-plot").querySelector(".ytitle").textContent;
            seen.paper = getComputedStyle(document.body).backgroundColor;
            document.body.dataset.probe = JSON.stringify(seen);
          }, 1000);
        }, 500));"""
        dom, console = self.dom(page, tmp_path, script)
        seen = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
        assert console == []
        assert seen == {
            "all": "30 of 30 prompts match; 8 shown.",
            "more": "30 of 30 prompts match; 16 shown.",
            "search": "1 of 30 prompts match; 1 shown.",
            "loss": "10 of 30 prompts match; 8 shown.",
            "plain": "0 of 30 prompts match; 0 shown.",
            "tie": "30 of 30 prompts match; 8 shown.",
            "quarter": "20 of 30 prompts match; 8 shown.",
            "lowest": "0 of 30 prompts match; 0 shown.",
            "worst": "Prompt 1",
            "candidates": 2,
            "axis": "Worst-of-4 win rate",
            "paper": "rgb(20, 23, 28)",
        }

    def test_fifty_runs_stay_small_and_draw(self, tmp_path):
        runs = [dataclasses.replace(two_methods()[0], label=f"run {i}") for i in range(50)]
        path = write_report(tmp_path / "fifty.html", ReportData(runs, "Best-of-4", baseline="run 0"))
        assert path.stat().st_size < 10_000_000
        dom, console = self.dom(path, tmp_path)
        assert 'data-ready="true"' in dom
        assert console == []
