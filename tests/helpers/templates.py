"""Chat templates in the style of common and of uncommon models, each with one mechanism if possible.

They are rendered as by transformers: a newline directly after a block tag is dropped, and so are spaces between the
beginning of a line and a block tag. The tokens are those of tests.helpers.tokenizers.
"""

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM_FIRST = (  # sets `system`, "" if there is none, and `rest`, the other messages
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)
ALTERNATE = (  # in a loop over messages `m`
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
TOOLS = "<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n"
REST = CHATML.replace("messages", "rest")
LLAMA3_TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
LLAMA3_SYSTEM = "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
LLAMA3_PROMPT = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
GEMMA_PROMPT = "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
COMMAND = (  # two special tokens in a row open a reply, and two close it
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
    "{% elif m.role == 'user' %}<|USER_TOKEN|>{{ m.content }}{% else %}<|SYSTEM_TOKEN|>{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
)

CHAT_TEMPLATES: dict[str, str | dict[str, str]] = {
    # --- ChatML -------------------------------------------------------------------------------------------------------
    "chatml": (  # nothing but headers and ends
        CHATML + CHATML_PROMPT
    ),
    "chatml-default-system": (  # inserts a system prompt of its own if the first message is not one
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML
        + CHATML_PROMPT
    ),
    "chatml-extended-system": (  # puts a sentence of its own into the system message, given or not
        SYSTEM_FIRST
        + "<|im_start|>system\nYou are a helpful assistant.\n{{ system }}<|im_end|>\n"
        + REST
        + CHATML_PROMPT
    ),
    "chatml-no-prompt": (  # ignores add_generation_prompt
        CHATML
    ),
    "chatml-always-prompt": (  # always adds the generation prompt, even after a finished reply
        CHATML + "<|im_start|>assistant{{ '\n' }}"  # a newline that ended the template would be dropped
    ),
    "chatml-open-end": (  # leaves the last message without an end, as if it were to be continued
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
    ),
    "chatml-newline-before-end": (  # a newline between a text and its end token
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "chatml-end-before-turn": (  # each turn closes the one before it, the last is closed after the loop
        "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% endfor %}<|im_end|>\n" + CHATML_PROMPT
    ),
    "plain-end": (  # the end of a turn is an added token that is not special
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|plain_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "generation-markers": (  # marks replies, end included, for return_assistant_tokens_mask
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT
    ),
    # --- Llama 3 ------------------------------------------------------------------------------------------------------
    "llama3": (  # trims every message; BOS from the variable
        "{{ bos_token }}{% for m in messages %}" + LLAMA3_TURN + "{% endfor %}" + LLAMA3_PROMPT
    ),
    "llama3-date": (  # always has a system turn, which opens with dates
        SYSTEM_FIRST
        + LLAMA3_SYSTEM
        + "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string | default('26 Jul 2024') }}\n\n"
        "{{ system | trim }}<|eot_id|>{% for m in rest %}" + LLAMA3_TURN + "{% endfor %}" + LLAMA3_PROMPT
    ),
    "llama3-tools": (  # tools, if passed, stand in the first user turn
        SYSTEM_FIRST
        + LLAMA3_SYSTEM
        + "{% if tools is not none %}Environment: ipython\n{% endif %}{{ system | trim }}<|eot_id|>"
        "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if loop.first and tools is not none %}Answer with a call of one of these functions:\n\n"
        "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}" + LLAMA3_PROMPT
    ),
    # --- Gemma --------------------------------------------------------------------------------------------------------
    "gemma": (  # refuses a system message, and roles that do not alternate
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}" + ALTERNATE + "<start_of_turn>"
        "{{ m.role | replace('assistant', 'model') }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + GEMMA_PROMPT
    ),
    "gemma3": (  # merges the system message into the first user turn; roles must alternate
        SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}" + ALTERNATE + "<start_of_turn>"
        "{{ m.role | replace('assistant', 'model') }}\n{% if loop.first and system %}{{ system }}\n\n{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + GEMMA_PROMPT
    ),
    "gemma-silent": (  # leaves out messages that are neither the user's nor the assistant's, and never raises
        "{{ bos_token }}{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<start_of_turn>"
        "{{ m.role | replace('assistant', 'model') }}\n{{ m.content | trim }}<end_of_turn>\n{% endif %}"
        "{% endfor %}" + GEMMA_PROMPT
    ),
    # --- [INST] -------------------------------------------------------------------------------------------------------
    "llama2": (  # <<SYS>> in the first user turn, BOS before every user turn, a space on both sides of the reply
        SYSTEM_FIRST + "{% for m in rest %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{{ ('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if loop.first and system else '') ~ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (  # glues the system message to the first user turn; the reply follows a space
        SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{{ system ~ '\n\n' if loop.first and system else '' }}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral-last-turn": (  # gives the system message to the last user turn, only when that ends the conversation
        SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{{ system ~ '\n\n' if loop.last and system else '' }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral-last-user": (  # gives the system message to the last user turn, even if a reply follows
        SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{{ system ~ '\n\n' if loop.revindex <= 2 and system else '' }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral-tight": (  # no space anywhere: the reply touches a special token on both sides
        SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST]"
        "{{ system ~ '\n\n' if loop.first and system else '' }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # --- reasoning ----------------------------------------------------------------------------------------------------
    "qwen3": (  # a think block before replies to the last user turn, none before earlier ones; cut at "</think>"
        "{% set ns = namespace(last_user=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set content, thoughts = m.content, '' %}{% if '</think>' in content %}"
        "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.last_user %}<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n{% endif %}"
        "{{ content.lstrip('\n') if loop.index0 > ns.last_user else content }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "qwen3-switch": (  # enable_thinking=False moves the empty think block from the last reply to the generation prompt
        "{% set thinks = enable_thinking is not defined or enable_thinking is not false %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last and thinks %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not thinks %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "qwen3-thinking": (  # the generation prompt opens a think block; the last reply has an empty one
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "think-stripped": (  # strips thoughts from all replies but the last
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT
    ),
    "think-prompt": (  # the generation prompt always has an empty think block, finished replies never
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "deepseek-r1": (  # the generation prompt ends with an open think block; replies lose their thoughts
        SYSTEM_FIRST + "{{ bos_token }}{{ system }}{% for m in rest %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "deepseek-v3.1": (  # "</think>" alone opens every reply, in the generation prompt as in finished ones
        SYSTEM_FIRST + "{{ bos_token }}{{ system }}{% for m in rest %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<|assistant|></think>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|></think>{% endif %}"
    ),
    # --- other families -----------------------------------------------------------------------------------------------
    "phi3": (  # ends the text with <|endoftext|>, unless a reply is asked for
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    "phi4": (  # turns without any newline, and the same closing token
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
    ),
    "command-r": (  # two special tokens make a header; strips every message; adds a system message where there is none
        SYSTEM_FIRST + "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ system.strip() or 'You reply.' }}"
        "<|END_OF_TURN_TOKEN|>{% for m in rest %}<|START_OF_TURN_TOKEN|>"
        "{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>' }}{{ m.content.strip() }}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "command-r7b": (  # the generation prompt lacks the special token that a reply begins with
        COMMAND + "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "command-a": (  # the generation prompt has all the special tokens that open a reply
        COMMAND + "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
    ),
    "zephyr": (  # EOS ends every turn, the system message's and the user's too
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "vicuna": (  # roles in plain text on one line; EOS ends replies only
        SYSTEM_FIRST + "{{ system ~ ' ' if system else '' }}{% for m in rest %}"
        "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "alpaca": (  # headings in plain text, a blank line between the parts
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}</s>\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "openchat": (  # a role of several words in plain text, a special token as end; the prompt has no space at its end
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}<end_of_turn>"
        "{% else %}GPT4 Correct {{ m.role | title }}: {{ m.content }}<end_of_turn>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}"
    ),
    "falcon": (  # plain text, and nothing ends a turn but a newline
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatglm": (  # numbered rounds with headers that are not ASCII
        SYSTEM_FIRST + "{{ system }}{% for m in rest %}"
        "{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n问：{{ m.content }}\n\n"
        "{% else %}答：{{ m.content }}</s>\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}答：{% endif %}"
    ),
    "granite": (  # a turn of the tools between the system's and the user's
        SYSTEM_FIRST + "<|start_header_id|>system<|end_header_id|>{{ system or 'You are Granite.' }}<|endoftext|>\n"
        "{% if tools %}<|start_header_id|>tools<|end_header_id|>{{ tools | tojson(indent=4) }}<|endoftext|>\n"
        "{% endif %}{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|endoftext|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    ),
    "bare": (  # no roles: the texts, with a newline after each
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    ),
    # --- other requirements of templates ------------------------------------------------------------------------------
    "needs-tools": (  # raises without tools
        "{% if not tools %}{{ raise_exception('This template needs tools') }}{% endif %}"
        + TOOLS
        + CHATML
        + CHATML_PROMPT
    ),
    "loops-over-tools": (  # assumes that there are tools, else raises a TypeError
        "<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
        + CHATML
        + CHATML_PROMPT
    ),
    "needs-user-first": (  # refuses to begin with anything but a user message
        "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with a user message') }}{% endif %}"
        + CHATML
        + CHATML_PROMPT
    ),
    "raises": (  # refuses everything
        "{{ raise_exception('No conversation is good enough') }}"
    ),
    "content-parts": (  # accepts a text and a list of parts as content
        "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "{% endmacro %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ text(m.content) }}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT
    ),
    "parts-only": (  # accepts only lists of parts: a text is dropped without an error
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "date-now": (  # today's date in the system turn
        SYSTEM_FIRST
        + "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.\n{{ system }}<|im_end|>\n"
        + REST
        + CHATML_PROMPT
    ),
    # --- other changes that templates make to messages ----------------------------------------------------------------
    "repeats-messages": (  # every message twice
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT
    ),
    "repeats-system": (  # the system message again before every user turn
        SYSTEM_FIRST + "{% for m in rest %}{% if m.role == 'user' and system %}<|im_start|>system\n{{ system }}"
        "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "drops-system": (  # leaves the system message out without an error
        SYSTEM_FIRST + REST + CHATML_PROMPT
    ),
    "drops-reply": (  # leaves out the assistant's last message
        "{% for m in messages %}{% if not (loop.last and m.role == 'assistant') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT
    ),
    "drops-history": (  # keeps the system message and the last two others
        SYSTEM_FIRST + "{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}{% for m in rest[-2:] %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "uppercase-system": (  # SHOUTS the system message
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | upper if m.role == 'system' else m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "strips-system": (  # strips the system message only
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.strip() if m.role == 'system' else m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "system-as-user": (  # a system message is a user turn like others, so two of them can follow each other
        "{% for m in messages %}<|im_start|>{{ 'assistant' if m.role == 'assistant' else 'user' }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "lstrips-reply": (  # strips replies on the left only
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.lstrip() if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    ),
    "space-after-reply": (  # a space between a reply and its end
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ ' ' ~ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "json-content": (  # messages are quoted as JSON, so newlines and quotation marks are escaped
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | tojson }}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT
    ),
    "prompt-adds-line": (  # the generation prompt has a line that finished replies lack
        "{% for m in messages %}### {{ m.role | capitalize }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant\nAnswer:\n{% endif %}"
    ),
    "bos": (  # BOS in the text, where a tokenizer's post-processor may add another
        "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "newline-after-bos": (  # a newline between BOS and the first turn
        "{{ bos_token }}\n{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # --- named templates ----------------------------------------------------------------------------------------------
    "named-without-default": {  # nothing to use for a plain conversation: transformers raises ValueError
        "tool_use": TOOLS + CHATML + CHATML_PROMPT,
        "rag": "{% for d in documents or [] %}{{ d.title }}\n{{ d.text }}\n\n{% endfor %}" + CHATML + CHATML_PROMPT,
    },
    "named": {  # "default" for conversations; with tools, "tool_use"
        "default": CHATML + CHATML_PROMPT,
        "tool_use": TOOLS + CHATML + CHATML_PROMPT,
    },
}
