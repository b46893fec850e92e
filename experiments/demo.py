"""Shows a page where a run predicts inputs that are typed, dropped or recorded, and explains its predictions.

`python -m experiments.demo --workdir=DIR [--host=127.0.0.1] [--port=7860]`; needs Gradio: pip install '.[demo]'
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.analysis.report.prediction_form import Field
    from mmfusion.inference.trained_model import TrainedModel

WORKDIR = flags.DEFINE_string("workdir", "", "the run's directory")
HOST = flags.DEFINE_string("host", "127.0.0.1", "the address to listen on; 0.0.0.0 lets other machines use the page")
PORT = flags.DEFINE_integer("port", 7860, "the port to listen on", lower_bound=1, upper_bound=65535)
DATA_DIR = flags.DEFINE_string("data_dir", "", "the folder of the run's prepared dataset on this machine")
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD = "100mb"
CSS = "footer { display: none !important; }"


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    if not WORKDIR.value:
        raise UserError("is required: give the run's directory", path="--workdir")
    cli.enable_compilation_cache()
    gradio = import_gradio()

    from mmfusion.inference.trained_model import load

    model = load(WORKDIR.value, data_dir=DATA_DIR.value or None, trust=TRUST.value)
    with tempfile.TemporaryDirectory(prefix="mmfusion-demo-") as uploads:  # removed with everything uploaded to it
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(gradio, model)
        try:
            page.queue(default_concurrency_limit=1).launch(
                server_name=HOST.value, server_port=PORT.value, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD, ssr_mode=False, enable_monitoring=False, mcp_server=False, footer_links=[],
                css=CSS, theme=theme(gradio),
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot listen there: {error}", path=f"--host={HOST.value} --port={PORT.value}") from error
        if HOST.value not in LOOPBACK:
            print(
                f"warning: --host={HOST.value}: everyone who reaches this address can use the page, without a password"
            )
        print(f"http://{HOST.value}:{PORT.value} shows {WORKDIR.value} until Ctrl-C", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that uploads are removed
        page.block_thread()


def import_gradio() -> Any:
    """Returns the module, with its telemetry off; raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError("needs Gradio, which is not installed: pip install 'gradio>=6,<7'", path="demo") from error
    return gradio


def build(gradio: Any, model: TrainedModel) -> Any:
    """Returns the page as Gradio blocks."""
    from mmfusion.analysis.report import prediction_form

    inputs = prediction_form.fields(model.reader)
    title = os.path.basename(os.path.normpath(WORKDIR.value))

    def answer(explain: bool, *values: Any) -> Iterator[str]:
        yield from prediction_form.answers(model, inputs, values, explain)

    with gradio.Blocks(title=f"{title} · mmfusion", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}\n{prediction_form.about(model.config, model.step)}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                components = [component(gradio, field) for field in inputs]
                explain = gradio.Checkbox(True, label="Explain the prediction (takes seconds, the first time longer)")
                with gradio.Row():
                    clear = gradio.ClearButton(components, value="Clear")
                    run = gradio.Button("Predict", variant="primary", elem_id="predict")
            with gradio.Column(scale=5, min_width=420):
                result = gradio.HTML("<p>The prediction appears here.</p>", elem_id="result", padding=True)
        gradio.on(
            [run.click, *(c.submit for c in components if isinstance(c, gradio.Textbox))],
            answer, [explain, *components], result, api_name="predict", show_progress="minimal",
        )  # fmt: skip
        clear.add(result)
    return page


def component(gradio: Any, field: Field) -> Any:
    """Returns the input of a field; its files reach the model as they were uploaded."""
    label, hint = field.label, field.hint
    if field.form == "text":
        return gradio.Textbox(label=label, placeholder=hint or None, lines=1, max_lines=8)
    if field.form == "number":
        return gradio.Number(label=label, value=None)
    if field.form == "choice":
        return gradio.Dropdown(list(field.choices), label=label, value=None)
    if field.form == "image":
        image = gradio.Image(label=label, type="filepath", sources=["upload", "clipboard", "webcam"], height=240)
        # Its conversion would lose 16-bit values, and fail on a damaged file before the model says what is wrong.
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image
    if field.form == "audio":
        return gradio.Audio(label=label, type="filepath", sources=["upload", "microphone"])
    label = f"{label}: {hint}" if hint else label
    return gradio.File(label=label, file_count="multiple" if field.form == "files" else "single", height=120)


def theme(gradio: Any) -> Any:
    """Returns a theme whose fonts are on the machine: the page loads nothing from elsewhere."""
    return gradio.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=["Helvetica", "Arial", "sans-serif"], font_mono=["monospace"]
    )


if __name__ == "__main__":
    cli.run(main)
