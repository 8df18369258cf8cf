package firecracker

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.yaml.in/yaml/v3"
)

// Firecracker's own description of its API, by its makers, under the licence beside it.
//
//go:embed testdata/api.yaml
var descriptionText []byte

// description is as much of Swagger 2.0 as the description uses.
type description struct {
	Paths map[string]map[string]struct {
		Parameters []struct {
			In       string
			Required bool
			Schema   schema
		}
		Responses map[string]struct{ Schema *schema }
	}
	Definitions map[string]schema
}

type schema struct {
	Ref        string `yaml:"$ref"`
	Type       string
	Required   []string
	Properties map[string]schema
	Items      *schema
	Enum       []string
	Minimum    *float64
	Maximum    *float64
}

var described = sync.OnceValue(func() description {
	var d description
	if err := yaml.Unmarshal(descriptionText, &d); err != nil {
		panic(err)
	}
	return d
})

// checkRequest holds a request against the description.
func (d description) checkRequest(method, path string, body []byte) error {
	operation, ok := d.Paths[d.template(path)][strings.ToLower(method)]
	if !ok {
		return faultf("Invalid request method and/or path: %s %s.", method, strings.TrimPrefix(path, "/"))
	}
	for _, parameter := range operation.Parameters {
		if parameter.In == "body" {
			return d.checkJSON(parameter.Schema, body)
		}
	}
	if len(body) > 0 {
		return faultf("%s request cannot have a body.", method)
	}
	return nil
}

// checkAnswer holds an answer against the description.
func (d description) checkAnswer(method, path string, status int, body []byte) error {
	responses := d.Paths[d.template(path)][strings.ToLower(method)].Responses
	response, ok := responses[strconv.Itoa(status)]
	if !ok {
		response, ok = responses["default"]
	}
	if !ok {
		return fmt.Errorf("status %d is not described", status)
	}
	if response.Schema == nil {
		if len(body) > 0 {
			return fmt.Errorf("status %d has a body: %s", status, body)
		}
		return nil
	}
	return d.checkJSON(*response.Schema, body)
}

func (d description) template(path string) string {
	if rest, ok := strings.CutPrefix(path, "/drives/"); ok && !strings.Contains(rest, "/") {
		return "/drives/{drive_id}"
	}
	return path
}

func (d description) checkJSON(s schema, data []byte) error {
	var value any
	if err := json.Unmarshal(data, &value); err != nil {
		return faultf("An error occurred when deserializing the json body of a request: %w.", err)
	}
	if err := d.check(s, value, "body"); err != nil {
		return faultf("An error occurred when deserializing the json body of a request: %w.", err)
	}
	return nil
}

func (d description) check(s schema, value any, at string) error {
	if name, ok := strings.CutPrefix(s.Ref, "#/definitions/"); ok {
		definition, ok := d.Definitions[name]
		if !ok {
			return fmt.Errorf("%s: no definition %s", at, name)
		}
		return d.check(definition, value, at)
	}
	switch s.Type {
	case "object":
		object, ok := value.(map[string]any)
		if !ok {
			return fmt.Errorf("%s is %T, want an object", at, value)
		}
		return d.checkObject(s, object, at)
	case "array":
		array, ok := value.([]any)
		if !ok {
			return fmt.Errorf("%s is %T, want an array", at, value)
		}
		for i, item := range array {
			if err := d.check(*s.Items, item, fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
	case "string":
		if text, ok := value.(string); !ok || len(s.Enum) > 0 && !slices.Contains(s.Enum, text) {
			return fmt.Errorf("%s is %v, want a string of %q", at, value, s.Enum)
		}
	case "boolean":
		if _, ok := value.(bool); !ok {
			return fmt.Errorf("%s is %v, want a boolean", at, value)
		}
	case "integer":
		number, ok := value.(float64)
		if !ok || number != float64(int64(number)) || s.Minimum != nil && number < *s.Minimum || s.Maximum != nil && number > *s.Maximum {
			return fmt.Errorf("%s is %v, want an integer in range", at, value)
		}
	default:
		return fmt.Errorf("%s: type %q of the description is not known here", at, s.Type)
	}
	return nil
}

// checkObject refuses unknown fields too, as Firecracker does.
func (d description) checkObject(s schema, object map[string]any, at string) error {
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			return fmt.Errorf("%s: missing field `%s`", at, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		property, ok := s.Properties[name]
		if !ok {
			return fmt.Errorf("%s: unknown field `%s`", at, name)
		}
		if err := d.check(property, object[name], at+"."+name); err != nil {
			return err
		}
	}
	return nil
}
