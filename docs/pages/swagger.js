// validatorUrl: null, for otherwise the page asks a validator on the network about the description.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  validatorUrl: null,
  persistAuthorization: true,
});
