"""What a person sees who opens the gateway in a browser, until there is a dashboard."""

from __future__ import annotations

from html import escape

from helexa import __version__

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>helexa cortex</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem}}
code,pre{{background:#8881;padding:.1em .3em;border-radius:4px}}pre{{padding:.8em;overflow-x:auto}}
:root{{color-scheme:light dark}}</style>
<h1>helexa cortex <small>{version}</small></h1>
<p>An OpenAI-compatible gateway. Its base URL for clients is <code>{base}/v1</code>.</p>
<ul>
<li><a href="/v1/models">/v1/models</a>: what can be asked</li>
<li><a href="/fleet">/fleet</a>: nodes, devices and models</li>
<li><a href="/health">/health</a>, <a href="/ready">/ready</a>, <a href="/version">/version</a></li>
</ul>
<p>On a terminal: <code>cortex status --gateway {base}</code></p>
</html>
"""


def front_page(base_url: str) -> str:
    """base_url: as the browser addressed us, which is a header's value and so escaped."""
    return _PAGE.format(version=escape(__version__), base=escape(base_url))
