// Every route with its options, by Swagger UI.

window.SwaggerUIBundle({ url: "openapi.json", dom_id: "#routes", deepLinking: true });
