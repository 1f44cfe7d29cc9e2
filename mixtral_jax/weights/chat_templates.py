"""Mixtral Instruct's chat template in Jinja, as transformers and llama.cpp read it.

The tokens are those of mistral-common for the tokenizers that are exported here, which put a space before every text
that follows a control token. What a template cannot do, and mistral-common does: join several messages of one role.
"""

from mixtral_jax.data.chat_template import INST
from mixtral_jax.data.tokenizer import Tokenizer

_SYSTEM = """
{%- if messages and messages[0].role == 'system' %}
  {%- set system = messages[0].content + '\\n\\n' %}
  {%- set turns = messages[1:] %}
{%- else %}
  {%- set system = '' %}
  {%- set turns = messages %}
{%- endif %}"""

# A question, an answer, and so on. The system prompt belongs to the first question.
_V1 = """
{{- bos_token }}
{%- for message in turns %}
  {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
    {{- raise_exception('After an optional system prompt, questions of the user and answers must alternate.') }}
  {%- elif message.role == 'user' %}
    {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message.content + eos_token }}
  {%- endif %}
{%- endfor %}"""

# The system prompt and the tools belong to the last question.
_V3 = """
{%- set last = namespace(question=-1) %}
{%- for message in turns %}
  {%- if message.role == 'user' %}
    {%- set last.question = loop.index0 %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
  {%- if message.role == 'user' %}
    {%- set asked = loop.index0 == last.question %}
    {%- if asked and tools %}
      {{- '[AVAILABLE_TOOLS][' }}
      {%- for tool in tools %}
        {%- set function = tool.function %}
        {{- '{"type": "function", "function": {"name": ' + function.name | tojson }}
        {{- ', "description": ' + (function.description or '') | tojson }}
        {{- ', "parameters": ' + function.parameters | tojson + '}}' + ('' if loop.last else ', ') }}
      {%- endfor %}
      {{- '][/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST]' + (system if asked else '') + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' and message.tool_calls %}
    {{- '[TOOL_CALLS][' }}
    {%- for call in message.tool_calls %}
      {%- set arguments = call.function.arguments %}
      {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' }}
      {{- arguments if arguments is string else arguments | tojson }}
      {{- ', "id": ' + call.id | tojson + '}' + ('' if loop.last else ', ') }}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- elif message.role == 'assistant' %}
    {{- message.content.rstrip(' ') + eos_token }}
  {%- elif message.role == 'tool' %}
    {%- set result = message.content %}
    {%- set number = result is string and result[:1] in '-0123456789' and result | float('') != '' %}
    {%- set word = result in ['true', 'false', 'null'] %}
    {%- set json = result is string and (number or word or result[:1] in ['{', '[', '"']) %}
    {{- '[TOOL_RESULTS]{"content": ' + (result if json else result | tojson) }}
    {{- ', "call_id": ' + message.tool_call_id | tojson + '}[/TOOL_RESULTS]' }}
  {%- else %}
    {{- raise_exception('Roles are user, assistant and tool, after an optional system prompt.') }}
  {%- endif %}
{%- endfor %}"""


def chat_template(tokenizer: Tokenizer) -> str | None:
    """Returns the template of a tokenizer: v3 where it has Mixtral's control tokens, v1 where it has not.

    None for a fine-tune with tokens of its own: they belong to a template that an import does not bring along.
    """
    if tokenizer.added_tokens:
        return None
    return (_SYSTEM + (_V3 if tokenizer.has_control(INST) else _V1)).strip()
