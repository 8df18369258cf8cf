package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"cal/approval/client"
	"cal/nucleus"
)

func (c *command) witness() *cobra.Command {
	var asJSON, key bool
	var forget string
	cmd := &cobra.Command{
		Use: "witness [ORIGIN]", Short: "Print the newest checkpoint of a log that the built-in witness cosigned and keeps",
		Example: "  nucleus-authority witness > kept.txt && cal audit verify --checkpoint kept.txt", Args: args(cobra.MaximumNArgs(1)),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "with the keys of log and witness, as JSON")
	cmd.Flags().BoolVar(&key, "key", false, "print the witness's key")
	cmd.Flags().StringVar(&forget, "forget", "", "give up what is known of the log of this name, because it was begun anew; recorded")
	cmd.RunE = func(cmd *cobra.Command, given []string) error {
		api := client.New(c.socket)
		defer api.Close()
		if forget != "" {
			return api.ForgetLog(cmd.Context(), forget)
		}
		origin := nucleus.LogOrigin
		if len(given) == 1 {
			origin = given[0]
		}
		kept, err := api.Witnessed(cmd.Context(), origin)
		switch {
		case err != nil:
			return err
		case asJSON:
			return json.NewEncoder(os.Stdout).Encode(kept)
		case key:
			fmt.Println(kept.Witness)
		case kept.Checkpoint == "":
			return fmt.Errorf("no checkpoint of %s was cosigned yet", origin)
		default:
			fmt.Print(kept.Checkpoint)
		}
		return nil
	}
	return cmd
}
