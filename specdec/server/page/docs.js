// The paths and parameters of openapi.json, as a page.
"use strict";

const $ = (id) => document.getElementById(id);

function add(parent, name, text) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).filter((name) => name !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  return schema.type === "array" ? `list of ${kind(schema.items ?? {})}` : schema.type ?? "anything";
}

function parameters(section, schema) {
  const list = add(section, "ul");
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const item = add(list, "li");
    add(item, "code", name);
    add(item, "span", `: ${kind(property)}${property.description ? `. ${property.description}` : ""}`);
  }
}

async function load() {
  const key = $("key").value;
  const response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  $("key-label").hidden = response.status !== 401;
  $("problem").hidden = response.ok;
  if (!response.ok) {
    $("problem").textContent = (await response.json()).error.message;
    return;
  }
  const api = await response.json();
  $("paths").replaceChildren();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const section = add($("paths"), "section");
      add(section, "h2", `${method.toUpperCase()} ${path}`);
      add(section, "p", operation.description ?? "");
      const body = operation.requestBody?.content["application/json"].schema;
      if (body) parameters(section, api.components.schemas[kind(body)]);
    }
  }
}

$("key").addEventListener("change", load);
load();
