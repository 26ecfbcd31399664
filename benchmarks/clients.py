"""The clients to compare with, each as its documentation has a user write it.

    python benchmarks/clients.py NAME URL PROMPTS CONCURRENCY

Asks every line of the file PROMPTS, keeps the answers in a list, and prints how many there are, and of what version.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

Client = Callable[[str, list[str], int], Coroutine[Any, Any, list[Any]]]


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


async def bare_aiohttp(url: str, prompts: list[str], concurrency: int, chunks: bool = False) -> list[Any]:
    """The floor in plain Python: one session, N workers, and nothing else: no retry, no limit, no file, no check."""
    import aiohttp

    answers: list[Any] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def work(todo: Any) -> None:
            for prompt in todo:
                body = {"model": "m", "messages": messages(prompt)}
                async with session.post(url + "/chat/completions", json=body) as reply:
                    answers.append(await reply.json())

        if chunks:  # the other way that is often written: as slow as the slowest of each chunk
            for first in range(0, len(prompts), concurrency):
                await asyncio.gather(*(work([prompt]) for prompt in prompts[first : first + concurrency]))
        else:
            todo = iter(prompts)
            await asyncio.gather(*(work(todo) for _ in range(concurrency)))
    return answers


async def aiohttp_chunks(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    return await bare_aiohttp(url, prompts, concurrency, chunks=True)


async def bounded(call: Callable[[str], Awaitable[Any]], prompts: list[str], concurrency: int) -> list[Any]:
    """What most people write: gather over all prompts, with a Semaphore."""
    slots = asyncio.Semaphore(concurrency)

    async def ask(prompt: str) -> Any:
        async with slots:
            reply = await call(prompt)
            return reply.choices[0].message.content

    return await asyncio.gather(*map(ask, prompts))


async def openai_sdk(url: str, prompts: list[str], concurrency: int, **options: Any) -> list[Any]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", **options) as client:
        create = client.chat.completions.create
        return await bounded(lambda prompt: create(model="m", messages=messages(prompt)), prompts, concurrency)


async def openai_sdk_aiohttp(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    from openai import DefaultAioHttpClient

    return await openai_sdk(url, prompts, concurrency, http_client=DefaultAioHttpClient())


async def litellm(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its list of prices would come from the network
    from litellm import acompletion

    options = {"model": "openai/m", "api_base": url, "api_key": "none"}
    return await bounded(lambda prompt: acompletion(messages=messages(prompt), **options), prompts, concurrency)


async def async_batch_llm(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    from async_batch_llm import llm, process_prompts

    strategy = llm("openai-compatible:m", base_url=url, api_key="none")
    batch = await process_prompts(strategy, prompts, concurrency=concurrency)
    return [result.output for result in batch.results if result.success]


async def flexllm(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    from flexllm import LLMClient

    limits = {"concurrency_limit": concurrency, "max_qps": 10**9}  # unless told otherwise it sends 1,000 a second
    async with LLMClient(model="m", base_url=url, api_key="none", **limits) as client:
        results = await client.chat_batch(list(map(messages, prompts)), show_progress=False)
    return [result.content for result in results if result.ok]


async def lm_deluge(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    from lm_deluge import LLMClient
    from lm_deluge.models import register_model

    os.environ["BENCHMARK_KEY"] = "none"
    with contextlib.redirect_stdout(sys.stderr):
        register_model(id="m", name="m", api_base=url, api_key_env_var="BENCHMARK_KEY")
        limits = {"max_requests_per_minute": 10**9, "max_tokens_per_minute": 10**12}  # else 1,000 and 500,000
        client = LLMClient("m", max_concurrent_requests=concurrency, **limits)
        answers: list[Any] = await client.process_prompts_async(
            prompts, return_completions_only=True, show_progress=False
        )
    return answers


async def langchain(url: str, prompts: list[str], concurrency: int) -> list[Any]:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="m", base_url=url, api_key="none")
    return [reply.content for reply in await model.abatch(prompts, {"max_concurrency": concurrency})]


CLIENTS: dict[str, tuple[str, Client]] = {
    "aiohttp": ("aiohttp", bare_aiohttp),
    "aiohttp-chunks": ("aiohttp", aiohttp_chunks),
    "openai": ("openai", openai_sdk),
    "openai-aiohttp": ("openai", openai_sdk_aiohttp),
    "litellm": ("litellm", litellm),
    "async-batch-llm": ("async-batch-llm", async_batch_llm),
    "flexllm": ("flexllm", flexllm),
    "lm-deluge": ("lm-deluge", lm_deluge),
    "langchain": ("langchain-openai", langchain),
}


def main(name: str, url: str, file: str, concurrency: str) -> None:
    """Ask, and print the count and the version."""
    package, client = CLIENTS[name]
    with open(file, encoding="utf-8") as lines:
        prompts = lines.read().splitlines()
    try:
        answers = asyncio.run(client(url, prompts, int(concurrency)))
    except ImportError:
        if not importlib.util.find_spec(package.replace("-", "_")):
            sys.exit(f"not installed: pip install {package}")
        raise
    print(json.dumps({"answers": sum(map(bool, answers)), package: importlib.metadata.version(package)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
