package node

import (
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"cal/guest/tools"
	"cal/node/client"
	"cal/nucleus"
)

type apiDescription struct {
	Paths      map[string]map[string]any
	Components struct {
		Schemas map[string]struct {
			Required   []string
			Properties map[string]struct{ Enum []string }
			Enum       []string
		}
	}
}

func readAPI(t *testing.T) apiDescription {
	t.Helper()
	raw, err := os.ReadFile("../api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var api apiDescription
	if err := yaml.Unmarshal(raw, &api); err != nil {
		t.Fatal(err)
	}
	return api
}

func equal(t *testing.T, what string, described, code []string) {
	t.Helper()
	slices.Sort(described)
	slices.Sort(code)
	if !slices.Equal(described, code) {
		t.Errorf("%s: api/openapi.yaml says %q, the code %q", what, described, code)
	}
}

var registration = regexp.MustCompile(`mux\.HandleFunc\("([A-Z]+) (/[^"]*)", (n\.[a-zA-Z]+)`)

func TestAPIDescribesTheRoutes(t *testing.T) {
	source, err := os.ReadFile("api.go")
	if err != nil {
		t.Fatal(err)
	}
	roles := map[string]string{"n.operator": "[operator]", "n.ofPod": "[operator agent]", "n.health": "<nil>"}
	var code, described []string
	for _, m := range registration.FindAllStringSubmatch(string(source), -1) {
		code = append(code, m[1]+" "+m[2]+" "+roles[m[3]])
	}
	if registered := strings.Count(string(source), "mux.Handle"); registered != len(code)+1 {
		t.Fatalf("api.go registers %d routes, of which this test reads %d and the one for what is unknown", registered, len(code))
	}
	for path, item := range readAPI(t).Paths {
		for method, operation := range item {
			if method == "parameters" {
				continue
			}
			described = append(described, fmt.Sprintf("%s %s %v", strings.ToUpper(method), path, operation.(map[string]any)["x-roles"]))
		}
	}
	equal(t, "routes and roles", described, code)
}

func TestAPIDescribesTheQuery(t *testing.T) {
	var described []string
	for _, p := range readAPI(t).Paths["/v1/pods/{id}/tools/{operation}"]["post"].(map[string]any)["parameters"].([]any) {
		described = append(described, p.(map[string]any)["name"].(string))
	}
	source, err := os.ReadFile("api.go")
	if err != nil {
		t.Fatal(err)
	}
	_, options, _ := strings.Cut(string(source), "func (r *request) options(")
	options, _, _ = strings.Cut(options, "\n}\n")
	var code []string
	for _, m := range regexp.MustCompile(`case "([a-z]+)":`).FindAllStringSubmatch(options, -1) {
		code = append(code, m[1])
	}
	equal(t, "query parameters", described, code)
}

// Fields and what must be given, from the JSON tags of the types that are sent.
func TestAPIDescribesTheTypes(t *testing.T) {
	api := readAPI(t)
	for name, value := range map[string]any{
		"Error": nucleus.Error{}, "Health": client.Health{}, "PodSpec": nucleus.PodSpec{}, "Image": nucleus.Image{}, "Layer": nucleus.Layer{},
		"Repo": nucleus.Repo{}, "Resources": nucleus.Resources{}, "Agent": nucleus.Agent{}, "Model": nucleus.Model{}, "Identity": nucleus.Identity{},
		"PodStatus": nucleus.PodStatus{}, "Approver": nucleus.Approver{}, "KnownApprover": nucleus.KnownApprover{}, "Budget": nucleus.Budget{}, "Spending": nucleus.Spending{}, "Limit": nucleus.Limit{}, "RepoStatus": nucleus.RepoStatus{}, "RepoFetched": client.RepoFetched{},
		"AgentRequest": client.AgentRequest{}, "AgentExit": client.AgentExit{}, "StreamResult": client.StreamResult{},
		"ReadArgs": tools.ReadArgs{}, "WriteArgs": tools.WriteArgs{}, "EditArgs": tools.EditArgs{}, "GlobArgs": tools.GlobArgs{}, "GrepArgs": tools.GrepArgs{},
		"RunArgs": tools.RunArgs{}, "CommitArgs": tools.CommitArgs{}, "PushArgs": tools.PushArgs{}, "PRArgs": tools.PRArgs{}, "FetchArgs": tools.FetchArgs{},
		"SpawnArgs": tools.SpawnArgs{}, "PodsArgs": tools.PodsArgs{},
	} {
		var fields, required []string
		for _, f := range reflect.VisibleFields(reflect.TypeOf(value)) {
			if f.Anonymous {
				continue
			}
			tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields = append(fields, tag)
			if options == "" {
				required = append(required, tag)
			}
		}
		schema := api.Components.Schemas[name]
		equal(t, "fields of "+name, slices.Collect(maps.Keys(schema.Properties)), fields)
		equal(t, "required fields of "+name, schema.Required, required)
	}
	var ops []string
	for _, op := range nucleus.Ops() {
		ops = append(ops, string(op))
	}
	equal(t, "operations", api.Components.Schemas["Operation"].Enum, ops)
	equal(t, "kinds of errors", api.Components.Schemas["Error"].Properties["kind"].Enum, errorKinds(t))
}

// errorKinds reads the constants, so that a new kind is not forgotten.
func errorKinds(t *testing.T) []string {
	t.Helper()
	source, err := os.ReadFile("../nucleus/errors.go")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, m := range regexp.MustCompile(`\bKind\w+\s+Kind = "(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		kinds = append(kinds, m[1])
	}
	return kinds
}
