"""How a conversation becomes text: one rendering for the preflight, the training and, baked in, for whoever serves.

The environment is the one in which transformers and vLLM run chat templates; it is ours so that the preflight can
render without importing torch.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import Template
from trimtab_trainer.endings import Fault

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The template of tokenizers that we train. The marks tell other tools which tokens are the assistant's."""


_FAMILIES = Path(__file__).parent / "templates"
"""Chat templates as their families published them, named as the spec names them."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks are passed over: they change no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Where chat templates run: sandboxed, because they come with models."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _now
    return made


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with everything that is decided about it."""

    source: str
    """Jinja text as it is baked into the artifact, system prompt included."""
    special_tokens: Mapping[str, str]
    """bos_token, eos_token and their kin, which templates may name."""

    @classmethod
    def of(
        cls,
        own: str | None,
        asked: str | None,
        system: str | None,
        special_tokens: Mapping[str, str],
        thinking: bool | None = None,
    ) -> ChatTemplate:
        """The model's own template or the one asked for, with the default system prompt and thinking written into it.

        Raises Fault(ChatTemplateMissing) when there is neither, Fault(SpecInvalid) when the one asked for is broken.
        """
        source = asked or own
        if source is None:
            raise Fault(
                Reason.CHAT_TEMPLATE_MISSING, "the rows are conversations and the tokenizer has no chat template"
            )
        whole = with_thinking(with_system(source, system), thinking)
        try:
            environment().from_string(whole)
        except jinja2.TemplateSyntaxError as error:
            place = "template.chatTemplate" if asked else "the tokenizer's chat template"
            reason = Reason.SPEC_INVALID if asked else Reason.MODEL_INVALID
            raise Fault(reason, f"{place}: line {error.lineno}: {error.message}", "Correct the Jinja text.") from error
        return cls(whole, dict(special_tokens))

    def renderer(self) -> Callable[..., str]:
        """A function (messages, tools=None, add_generation_prompt=False, **arguments) → text, compiled once."""
        compiled = environment().from_string(self.source)

        def render(
            messages: list[dict[str, Any]],
            tools: list[Any] | None = None,
            add_generation_prompt: bool = False,
            **arguments: Any,
        ) -> str:
            return compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **arguments},
            )

        return render


def asked_for(template: Template) -> str | None:
    """The source of the template that a spec names or writes; None leaves it to the model's own."""
    if template.name is None:
        return template.chat_template
    return CHATML if template.name == "chatml" else (_FAMILIES / f"{template.name}.jinja").read_text()


def with_thinking(source: str, thinking: bool | None) -> str:
    """The template with a word on thinking for whoever asks and says nothing of it."""
    if thinking is None:
        return source
    value = "true" if thinking else "false"
    return f"{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {value} %}}{{%- endif %}}" + source


def with_system(source: str, system: str | None) -> str:
    """The template with a system prompt for conversations that bring none."""
    if not system:
        return source
    quoted = system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return (
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{{'role': 'system', 'content': '{quoted}'}}] + messages %}}"
        "{%- endif %}" + source
    )


def template_in(folder: Path) -> str | None:
    """The chat template that lies with a tokenizer, without loading it."""
    written = folder / "chat_template.jinja"
    if written.is_file():
        return written.read_text()
    configuration = folder / "tokenizer_config.json"
    if not configuration.is_file():
        return None
    found = json.loads(configuration.read_text()).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def special_tokens_in(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and their kin that lie with a tokenizer, without loading it."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            for key, value in json.loads(path.read_text()).items():
                text = value.get("content") if isinstance(value, dict) else value
                if re.fullmatch(r"(bos|eos|unk|sep|pad|cls|mask)_token", key) and isinstance(text, str):
                    found[key] = text
    return found
