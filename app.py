"""A page to try a trained model on: a photograph in, its infrared image and all maps out.

    python app.py --checkpoint runs/demo/finetune/best_model.pth
    python app.py --checkpoint runs/train/export --port 8000 --host 0.0.0.0

Needs the extra [app] (Gradio). Listens on this machine alone unless --host says otherwise; nothing
is sent anywhere, and --share (a public link through Gradio's servers) is off unless asked for.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from assembly import views as v
from assembly.views import AppConfig, Named, Viewer, Views
from utils import config, dist
from utils.problems import sentences_of
from utils.run import entry

MOST_SAMPLES, MOST_FILES = 16, 100
FORMATS = {
    "png8": "8-bit PNG (grey)",
    "png16": "16-bit PNG, with unit and scale in a .json",
    "tiff": "32-bit float TIFF",
    "npy": "kelvin as .npy",
}
INTRO = """# ThermaFlux
A photograph in, the thermal infrared image that a camera might have taken out. Values are an
estimate, no measurement of temperature."""
CSS = "footer {display: none !important} .gradio-container {max-width: 1280px !important}"
KEYS = ("checkpoint", "device", "fast", "host", "port", "share", "upload_mb")


def main() -> None:
    cfg = config.load(AppConfig, flags={name: name for name in KEYS})
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    viewer = Viewer(cfg.checkpoint, dist.init(cfg.device), cfg.fast)
    print(viewer.plan)
    import gradio as gr

    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    with tempfile.TemporaryDirectory(prefix="thermaflux-") as downloads:
        page(viewer, cfg, downloads).queue(default_concurrency_limit=1, max_size=20).launch(
            server_name=cfg.host,
            server_port=cfg.port,
            share=cfg.share,
            max_file_size=cfg.upload_mb * 2**20,
            theme=gr.themes.Soft(**fonts),
            css=CSS,
            ssr_mode=False,
        )


def page(viewer: Viewer, cfg: AppConfig, downloads: str) -> Any:
    """The Gradio page of one model; files to download are written below `downloads`."""
    import gradio as gr

    with gr.Blocks(
        title="ThermaFlux", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        gr.Markdown(INTRO)
        found = gr.State({})
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                files = gr.File(
                    label=f"Photographs (at most {cfg.upload_mb} MB each)",
                    file_count="multiple",
                    height=140,
                )
                folder = gr.UploadButton("or a folder", file_count="directory", size="sm")
                samples = gr.Slider(1, MOST_SAMPLES, 4, step=1, label="Samples")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                start = gr.Button("Translate", variant="primary")
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=3):
                with gr.Row():
                    chosen = gr.Dropdown([], label="Photograph", interactive=True)
                    colors = gr.Dropdown(
                        list(v.COLOR_MAPS), value="iron", label="Colours", interactive=True
                    )
                shown = draw_tabs(gr)
                with gr.Row():
                    labels = [(FORMATS[name], name) for name in viewer.formats()]
                    format = gr.Dropdown(labels, value="png8", label="File", interactive=True)
                    save = gr.DownloadButton("Download", interactive=False, size="lg")
        pictures = [chosen, colors, found]
        folder.upload(lambda paths: paths, folder, files)
        made = start.click(
            lambda *told: run(gr, viewer, *told),
            [files, samples, seed],
            [found, chosen, status],
        )
        drawn = made.then(draw, pictures, shown)
        for changed in (chosen, colors):
            changed.input(draw, pictures, shown)
        for after in (drawn.then, format.input):
            after(lambda *told: write(gr, viewer, downloads, *told), [format, found], save)
    return blocks


def draw_tabs(gr: Any) -> list[Any]:
    """What `draw` fills."""
    with gr.Tab("Visible | infrared"):
        both = gr.ImageSlider(show_label=False, interactive=False, height=480, elem_id="both")
        about = gr.Markdown()
    with gr.Tab("Maps"):
        maps = gr.Gallery(show_label=False, columns=2, object_fit="contain", elem_id="maps")
    with gr.Tab("Samples"):
        drawn = gr.Gallery(show_label=False, columns=4, object_fit="contain", elem_id="samples")
    with gr.Tab("Uncertainty"):
        spread = gr.Image(show_label=False, interactive=False, height=480, elem_id="spread")
        of_spread = gr.Markdown()
    return [both, about, maps, drawn, spread, of_spread]


def run(gr: Any, viewer: Viewer, files: list[str] | None, samples: float, seed: float) -> tuple:
    """Translate what was uploaded: (name -> Views, the list of names, what to say)."""
    found: dict[str, Views] = {}
    paths = [path for path in map(Path, files or []) if not path.name.startswith(".")]
    faults = [] if paths else ["**Nothing to translate: drop a photograph first.**"]
    if len(paths) > MOST_FILES:
        faults.append(f"Only the first {MOST_FILES} of {len(paths)} files were taken.")
    for path in gr.Progress().tqdm(paths[:MOST_FILES], desc="translating", unit="photograph"):
        name, same = path.name, sum(one.name == path.name for one in found.values())
        try:
            found[f"{name} ({same + 1})" if same else name] = viewer.look(
                Named(path, path.name), int(samples), int(seed or 0)
            )
        except (ValueError, OSError) as error:
            faults += [f"**{sentence}**" for sentence in sentences_of(error)]
    done = [f"{len(found)} translated."] if found else []
    names = list(found)
    return (
        found,
        gr.update(choices=names, value=names[0] if names else None),
        "\n\n".join(done + faults),
    )


def draw(name: str | None, colors: str, found: dict[str, Views]) -> tuple:
    """The pictures of one photograph, for `draw_tabs`."""
    if name not in found:
        return None, "", [], [], None, ""
    one = found[name]
    infrared = v.shown(one, one.mean, colors)
    maps = [(v.shown(one, one.intensity, colors), "intensity (a proxy of heat)")]
    if (materials := v.material_picture(one)) is not None:
        maps.append((materials, f"materials: {v.material_names(one)}"))
    if one.fused is not None:
        maps.append((v.shown(one, one.fused, colors), "fused: stage 1's own infrared"))
    maps.append((infrared, f"mean: {one.mean_is}"))
    samples = [(v.shown(one, x, colors), f"sample {i}") for i, x in enumerate(one.samples, 1)]
    height, width = one.photograph.shape[:2]
    about = f"{name}, {width} x {height}. Infrared: the mean, {one.mean_is}."
    if (spread := one.spread()) is None:
        return (v.photograph(one), infrared), about, maps, samples, None, NO_SPREAD
    most = max(float(spread.max()), 1e-6)
    told = (
        f"Standard deviation of each pixel over {len(one.samples)} samples: {spread.mean():.3f} on"
        f" average, at most {most:.3f} (the brightest here), of the infrared range 0 to 1."
    )
    picture = v.shown(one, spread, "viridis", most)
    return (v.photograph(one), infrared), about, maps, samples, picture, told


NO_SPREAD = "Needs two samples or more of a model that is trained to sample."


def write(gr: Any, viewer: Viewer, downloads: str, format: str, found: dict[str, Views]) -> Any:
    """The download: one file, or an archive of several."""
    files = {
        f"{Path(name).stem}_infrared{suffix}": data
        for name, one in found.items()
        for suffix, data in viewer.encode(one, format).items()
    }
    if not files:
        return gr.update(value=None, interactive=False)
    ((name, data), *more) = files.items()
    if more:
        name, data = "infrared.zip", v.zip_of(files)
    path = Path(tempfile.mkdtemp(dir=downloads)) / name
    path.write_bytes(data)
    return gr.update(value=str(path), interactive=True, label=f"Download {name}")


if __name__ == "__main__":
    entry(main)
