"""What comes from the other side is not believed: what was tried at each door, and its test.

| | Tried | Tests |
|---|---|---|
| A1 | a model folder that names files outside | `storage/test_model_folder.py`: a_hostile_folder_is_refused_by_name, neither_training_nor_evaluation_opens_anything_outside |
| A2 | many evaluations that differ by a sample or a token | `learning/test_disclosure.py`: losses_do_not_spell_a_sample, no_two_settings_differ_by_few_samples, lengths_differ_by_no_sample_or_by_many |
| A3 | a prompt that begins like a sample | `learning/test_disclosure.py`: a_text_learnt_by_heart_leaves_only_where_prompts_are_allowed |
| A4 | claims of bytes, nested durations, claims of an absent update | `test_claims.py`: no_claim_keeps_the_others_from_their_report, bytes_are_those_of_the_files_and_an_absent_update_has_none; `test_page.py` |
| A5 | evaluations with NaN, 10**400, another's name, another round, garbled, 60 MB | `observe/test_report.py`: a_bad_evaluation_harms_nobody_else; `test_random_documents.py`: an_evaluation_counts_or_is_not_evaluated; `test_memory.py` |
| A6 | FedNova, one step claimed of forty | `test_claims.py`: fednova_multiplies_no_delta_by_more_than_four, fednova_bounds_an_update_that_was_held_while_the_round_waited, complete_means_the_steps_that_were_asked |
| A7 | 2**53 tokens claimed | `test_claims.py`: nobody_weighs_more_than_its_task_allows, a_claim_that_is_refused_decides_no_later_quorum, samples_are_added_up_without_an_end |
| A8 | an update in another's name | `test_claims.py`: who_speaks_in_anothers_name_is_refused_and_the_other_counts; `server/test_admission.py`: nobody_speaks_who_was_not_asked |
| A9 | a loss of 0, or none, of one facility | `test_target.py` |
| A10 | a norm of 5e14 among two; one that grows | `test_norms.py`: one_of_two_cannot_send_a_norm_without_bounds, one_of_two_cannot_grow_beyond_its_own_last_rounds, who_claims_no_steps_does_not_escape_the_bound |
| A11 | honest updates of few steps and of many | `test_norms.py`: who_did_all_its_work_counts_beside_two_that_were_cut_off, no_honest_update_is_refused_in_thirty_rounds, near_an_optimum_one_step_may_be_larger_than_forty |
| A12 | no signature, another's, another run's | `test_signed.py`; `storage/test_signature.py` |
| A13 | a staging folder that somebody prepared | `facility/test_staging.py`: a_folder_that_somebody_prepared_is_refused, a_folder_of_another_user_is_refused, only_this_user_can_enter_the_folder |
| A14 | ESC and bidi characters in whatever is shown | `test_words.py`; `workflows/test_terminal.py` |
| A15 | pickled weights | `storage/test_model_folder.py`: a_hostile_folder_is_refused_by_name; `steps/test_initialise.py`: pickled_weights_are_not_read_even_under_a_manifest |
| A16 | an error whose text quotes a sample | `test_words.py`: an_error_that_is_not_ours_leaves_as_its_class_and_place; `learning/test_disclosure.py`: no_message_quotes_the_data, a_tokenizer_that_fails_quotes_nothing |

Every name stands for `test_` and the name. Random documents, ten thousand at each door, are in
`test_random_documents.py`; `python -m tests.support.fuzz --manifests --tries 10000` sends as many
through aggregation and report.
"""  # noqa: E501 (a table)
