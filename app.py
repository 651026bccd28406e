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
INTRO = """# ThermaFlux
A photograph in, the thermal infrared image that a camera might have taken out. Values are an
estimate, no measurement of temperature."""
CSS = """footer {display: none !important}
.gradio-container {max-width: 1360px !important}
.pictures .thumbnail-item {aspect-ratio: 3 / 2 !important}
#spread img {width: 100% !important; height: 100% !important; object-fit: contain}"""
KEYS = ("checkpoint", "device", "fast", "host", "port", "share", "upload_mb")


def main() -> None:
    cfg = config.load(AppConfig, flags={name: name for name in KEYS})
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    viewer = Viewer(cfg.checkpoint, dist.init(cfg.device), cfg.fast)
    print(viewer.plan)
    import gradio as gr

    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    with tempfile.TemporaryDirectory(prefix="thermaflux-") as downloads:
        os.environ["GRADIO_TEMP_DIR"] = downloads  # uploads too are gone when the page ends
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
            with gr.Column(scale=1, min_width=320):
                files = gr.File(label="Photographs", file_count="multiple", height=150)
                folder = gr.UploadButton("or a folder", file_count="directory", size="sm")
                samples = gr.Slider(1, MOST_SAMPLES, 4, step=1, label="Samples")
                seed = gr.Number(0, label="Seed of the first sample", precision=0, minimum=0)
                start = gr.Button("Translate", variant="primary")
                limits = f"At most {MOST_FILES} files, each of at most {cfg.upload_mb} MB."
                status = gr.Markdown(limits, elem_id="status")
                labels = [(v.FORMATS[name], name) for name in viewer.formats()]
                format = gr.Dropdown(labels, value="png8", label="Download as", interactive=True)
                save = gr.DownloadButton("Download", interactive=False)
            with gr.Column(scale=3):
                with gr.Row():
                    chosen = gr.Dropdown([], label="Photograph", interactive=True)
                    colors = gr.Dropdown(
                        list(v.COLOR_MAPS), value="iron", label="Colours", interactive=True
                    )
                stretch = gr.Checkbox(
                    label="Stretch the contrast: from the darkest to the brightest of each picture",
                    container=False,
                )
                shown = draw_tabs(gr)
        pictures = [chosen, colors, stretch, found]
        folder.upload(lambda paths: paths, folder, files)

        def translated(files, samples, seed, progress=gr.Progress()):  # noqa: B008, Gradio's way
            return run(gr, viewer, progress, files, samples, seed)

        made = start.click(translated, [files, samples, seed], [found, chosen, status])
        drawn = made.then(draw, pictures, shown)
        for changed in (chosen, colors, stretch):
            changed.input(draw, pictures, shown)
        for after in (drawn.then, format.input):
            after(lambda *inputs: write(gr, viewer, downloads, *inputs), [format, found], save)
    return blocks


def draw_tabs(gr: Any) -> list[Any]:
    """What `draw` fills."""
    plain = dict(show_label=False, interactive=False, buttons=["fullscreen", "download"])
    several = dict(plain, object_fit="contain", height=620, elem_classes="pictures")
    with gr.Tab("Visible | infrared"):
        both = gr.ImageSlider(height=480, elem_id="both", **plain)
        about = gr.Markdown("Nothing yet: drop a photograph and press *Translate*.")
    with gr.Tab("Maps"):
        maps = gr.Gallery(columns=2, elem_id="maps", **several)
        materials = gr.Markdown()
    with gr.Tab("Samples"):
        drawn = gr.Gallery(columns=2, elem_id="samples", **several)
    with gr.Tab("Uncertainty"):
        spread = gr.Image(height=480, elem_id="spread", **plain)
        of_spread = gr.Markdown()
    return [both, about, maps, materials, drawn, spread, of_spread]


def run(
    gr: Any, viewer: Viewer, progress: Any, files: list[str] | None, samples: float, seed: float
) -> tuple:
    """Translate what was uploaded: (name -> Views, the list of names, what to say)."""
    found: dict[str, Views] = {}
    paths = [path for path in map(Path, files or []) if not path.name.startswith(".")]
    faults = [] if paths else ["**Nothing to translate: drop a photograph first.**"]
    if len(paths) > MOST_FILES:
        faults.append(f"Only the first {MOST_FILES} of {len(paths)} files were taken.")
    for path in progress.tqdm(paths[:MOST_FILES], desc="translating", unit="photograph"):
        same = sum(one.name == path.name for one in found.values())  # in another folder
        name = f"{path.name} ({same + 1})" if same else path.name
        try:
            found[name] = viewer.look(Named(path, path.name), int(samples), int(seed or 0))
        except (ValueError, OSError) as error:
            faults += [f"**{sentence}**" for sentence in sentences_of(error)]
    done = [f"{len(found)} translated."] if found else []
    names = list(found)
    return (
        found,
        gr.update(choices=names, value=names[0] if names else None),
        "\n\n".join(done + faults),
    )


def draw(name: str | None, colors: str, stretch: bool, found: dict[str, Views]) -> tuple:
    """The pictures of one photograph, for `draw_tabs`."""
    if name not in found:
        return None, "", [], "", [], None, ""
    one = found[name]

    def picture(values: Any) -> Any:
        low, high = (values.min(), values.max()) if stretch else (0, 1)
        return v.shown(one, values, colors, low, high)

    infrared = picture(one.mean)
    maps = [(picture(one.intensity), "intensity")]
    materials = v.material_picture(one)
    maps += [] if materials is None else [(materials, "materials")]
    maps += [] if one.fused is None else [(picture(one.fused), "fused, stage 1")]
    maps.append((infrared, "mean"))
    samples = [(picture(x), f"sample {i}") for i, x in enumerate(one.samples, 1)]
    height, width = one.photograph.shape[:2]
    about = (
        f"{name}, {width} x {height}. Infrared: the mean, {one.mean_is}; it reaches from"
        f" {one.mean.min():.2f} to {one.mean.max():.2f} of the range 0 to 1."
    )
    of_maps = "" if materials is None else f"Materials: {v.material_names(one)}."
    spread, of_spread = one.spread(), NO_SPREAD
    if spread is not None:
        most = max(float(spread.max()), 1e-6)
        of_spread = (
            f"Standard deviation of each pixel over {len(one.samples)} samples:"
            f" {spread.mean():.2g} on average, {most:.2g} at most (the brightest here), of the"
            " infrared range 0 to 1."
        )
        spread = v.shown(one, spread, "viridis", 0, most)
    return (v.photograph(one), infrared), about, maps, of_maps, samples, spread, of_spread


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
