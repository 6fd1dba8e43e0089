import datetime
import decimal
import json
import math

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from dopfn_jax.cells import TableError
from dopfn_jax.columns import Scale
from dopfn_jax.tables import Schema, read_treatment

T = np.array([0, 1, 0, 1, 0, 1])
Y = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 7.0])

# fmt: off
DATES = [
    "2021-01-31", "2021/1/31", "2021-01", "2021-01-31T10:00:00Z", "2021-01-31 10:00:00+0100",
    "31.01.2021", "1/31/21", "31 Jan 2021", "Jan 31, 2021", "31-JAN-21", "March 2021", "2021Q1",
    "Sunday, 31 January 2021", "10:30", "10:30:15 pm", "1/31/2021 9:05 AM",
]
NO_DATES = [
    "may", "Mon", "18-24", "1-2", "10-12", "3+", "Mary 12", "A1", "1234-56", "12:3", "Route 66",
    "2021-13-01", "Q1", "5 stars", "marketing", "v1.2.3.4",
]
# fmt: on


def fit(X, t=T, y=Y):
    return Schema.fit(X, t, y)


def fit_column(values):
    """The schema of a table with one column, and its codes or numbers in their own units."""
    schema, table = fit(pd.DataFrame({"a": values}))
    column = schema.columns[0]
    if column.indicators:
        codes = np.where(np.isnan(table.x[:, 0]), np.nan, table.x.argmax(axis=1))
        return column, codes.astype(float)
    return column, column.scale.restore(table.x[:, 0])


class TestIndicators:
    COLORS = ("red", "blue", None, "green", "red", "blue")

    def test_each_category_without_an_order_is_a_column(self) -> None:
        X = pd.DataFrame({"size": np.arange(6.0), "color": self.COLORS, "flag": list("ababab")})
        schema, table = fit(X)
        assert table.x.shape == (6, 5)
        expected = pd.get_dummies(X["color"])[["blue", "green", "red"]].to_numpy(float, copy=True)
        expected[2] = np.nan
        np.testing.assert_array_equal(table.x[:, 1:4], expected)
        assert list(schema.decode(table.x, 1)) == list(self.COLORS)
        assert list(schema.decode(table.x, 2)) == list("ababab")
        again = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
        np.testing.assert_array_equal(again.read_covariates(X.iloc[::-1]), table.x[::-1])
        with pytest.raises(TableError, match="column 'color' holds 'pink', unseen"):
            schema.read_covariates(X.assign(color="pink"))

    def test_an_order_is_kept_as_codes(self) -> None:
        sizes = pd.Categorical(list("slmslm"), ["s", "m", "l"], ordered=True)
        ordered, table = fit(pd.DataFrame({"a": sizes}))
        assert not ordered.columns[0].indicators and table.x.shape == (6, 1)
        unordered, table = fit(pd.DataFrame({"a": pd.Categorical(sizes, ordered=False)}))
        assert unordered.columns[0].categories == ("s", "m", "l") and table.x.shape == (6, 3)

    def test_columns_of_few_categories_come_first_where_room_is_short(self) -> None:
        X = pd.DataFrame({"many": list("abcdef"), "few": list("abcabc"), "x": np.arange(6.0)})
        with pytest.warns(UserWarning, match="no room for an indicator .* of 'many'"):
            schema, table = Schema.fit(X, T, Y, most=5)
        assert [column.indicators for column in schema.columns] == [False, True, False]
        assert table.x.shape == (6, 5)
        _, table = Schema.fit(X, T, Y, most=10)
        assert table.x.shape == (6, 10)
        with pytest.warns(UserWarning, match="no room for an indicator .* of 'few'"):
            Schema.fit(X[["few", "x"]], T, Y, most=3)


class TestAccepted:
    @pytest.mark.parametrize(
        "convert",
        [
            lambda cells: cells,
            lambda cells: cells.astype(np.float32),
            lambda cells: cells.tolist(),
            lambda cells: cells.astype(object),
            lambda cells: cells.astype(str),
            lambda cells: jnp.array(cells),
            lambda cells: jnp.array(cells, jnp.bfloat16),
            lambda cells: pd.DataFrame(cells, columns=["b", "a"]),
            lambda cells: pd.DataFrame(cells, columns=["b", "a"]).convert_dtypes(),
        ],
    )
    def test_containers_of_numbers_give_the_same_cells(self, convert) -> None:
        X = convert(np.arange(12).reshape(6, 2))
        schema, table = fit(X)
        assert table.x.dtype == table.t.dtype == table.y.dtype == np.float32
        column = (np.arange(0, 12, 2) - 5) / np.arange(0, 12, 2).std()
        np.testing.assert_allclose(table.x, np.stack([column, column], axis=1), rtol=1e-6)
        np.testing.assert_array_equal(schema.read_covariates(X), table.x)
        np.testing.assert_allclose(schema.outcome.restore(table.y), Y, rtol=1e-6)

    @pytest.mark.parametrize(
        "convert",
        [
            lambda t: t.tolist(),
            lambda t: t.astype(bool),
            lambda t: t[:, None],
            lambda t: t.astype(str),
            lambda t: jnp.array(t),
            lambda t: pd.Series(t),
            lambda t: pd.Series(t, dtype="Int64"),
            lambda t: pd.Series(t).astype("category"),
            lambda t: pd.DataFrame({"t": t}),
        ],
    )
    def test_containers_of_the_treatment(self, convert) -> None:
        np.testing.assert_array_equal(read_treatment(convert(T)), T)

    @pytest.mark.parametrize("X", [None, np.empty((6, 0)), pd.DataFrame(index=range(6))])
    def test_a_table_without_covariates(self, X) -> None:
        schema, table = fit(X)
        assert table.x.shape == (6, 0)
        assert schema.read_covariates(None, rows=3).shape == (3, 0)
        assert schema.read_covariates(np.empty((2, 0))).shape == (2, 0)

    def test_missing_cells_stay_missing(self) -> None:
        for values in ([1, None, 3, 4, 5, 6], ["1", "", "3", "4", "nan", "6"]):
            _, numbers = fit_column(values)
            expected = [math.nan if v in (None, "", "nan") else float(v) for v in values]
            np.testing.assert_allclose(numbers, expected, rtol=1e-6)
        masked = np.ma.masked_equal(np.arange(6.0)[:, None], 2)
        assert np.isnan(fit(masked)[1].x[:, 0]).tolist() == [i == 2 for i in range(6)]
        assert np.isnan(fit(np.full((6, 1), np.nan))[1].x).all()

    def test_objects_that_are_numbers(self) -> None:
        values = [True, decimal.Decimal("2.5"), np.float32(3), np.int64(4), np.bool_(False), 6]
        np.testing.assert_allclose(fit_column(values)[1], [1, 2.5, 3, 4, 0, 6], atol=1e-6)
        np.testing.assert_allclose(fit_column([True, False] * 3)[1], [1, 0] * 3, atol=1e-6)

    def test_text_becomes_categories_in_alphabetical_order(self) -> None:
        column, codes = fit_column(["low", "high", None, "mid ", "low", "high"])
        assert column.categories == ("high", "low", "mid") and column.indicators
        np.testing.assert_allclose(codes, [1, 0, math.nan, 2, 1, 0], atol=1e-6)

    def test_categoricals_keep_their_order_and_unused_categories(self) -> None:
        sizes = pd.Categorical(["S", "L", None, "S", "S", "L"], ["S", "M", "L"], ordered=True)
        column, codes = fit_column(sizes)
        assert column.categories == ("S", "M", "L")
        np.testing.assert_allclose(codes, [0, 2, math.nan, 0, 0, 2], atol=1e-6)
        fit_column(pd.cut(np.arange(6), 3))

    def test_categories_that_no_row_has_are_forgotten_where_there_is_no_order(self) -> None:
        filtered = pd.Categorical(list("xzxzxz"), list("xyz"))
        column, codes = fit_column(filtered)
        assert column.categories == ("x", "z")
        np.testing.assert_array_equal(codes, [0, 1] * 3)
        schema, _ = fit(pd.DataFrame({"a": filtered}))
        with pytest.raises(TableError, match="column 'a' holds 'y', unseen in the fitted table"):
            schema.read_covariates(pd.DataFrame({"a": pd.Categorical(["y"], list("xyz"))}))
        # Of a hundred there would be no room for indicators, of the three that are left there is.
        many = pd.Categorical(["c1", "c2", "c3"] * 2, [f"c{i}" for i in range(100)])
        schema, table = Schema.fit(pd.DataFrame({"a": many}), T, Y, most=64)
        assert schema.columns[0].indicators and table.x.shape == (6, 3)

    def test_text_with_underscores_is_no_number(self) -> None:
        column, codes = fit_column(["5_9", "10_14", "5_9", "10_14", "15_19", "5_9"])
        assert column.categories == ("10_14", "15_19", "5_9")
        np.testing.assert_array_equal(codes, [2, 0, 2, 0, 1, 2])

    def test_categories_are_recognised_in_any_type(self) -> None:
        fitted = pd.DataFrame({"a": pd.Categorical([1, 2, 3, 1, 2, 3])})
        schema, table = fit(fitted)
        for dtype in (int, float, str, "category", object):
            query = fitted["a"].astype(int).astype(dtype).to_frame()
            np.testing.assert_array_equal(schema.read_covariates(query), table.x)

    def test_a_column_that_only_rounding_varies_is_constant(self) -> None:
        schema, table = fit(np.array([[0.1 + 0.2, 0.3, 0.3] * 2]).T)
        np.testing.assert_array_equal(table.x, np.zeros((6, 1)))
        np.testing.assert_allclose(schema.read_covariates([[0.31]]), [[0.01]], rtol=1e-6)

    def test_frames_of_other_libraries_keep_their_names(self) -> None:
        class Frame:
            """As those of Polars and Arrow."""

            def __init__(self, table: pd.DataFrame):
                self.to_pandas = table.copy
                self.__array__ = table.to_numpy

        X = pd.DataFrame({"a": Y, "b": T})
        schema, table = fit(Frame(X))
        assert [column.name for column in schema.columns] == ["a", "b"]
        np.testing.assert_array_equal(schema.read_covariates(Frame(X[["b", "a"]])), table.x)

    def test_columns_of_a_data_frame_are_matched_by_name(self) -> None:
        X = pd.DataFrame({"a": Y, "b": ["u", "v"] * 3, 3: T})
        schema, table = fit(X)
        np.testing.assert_array_equal(schema.read_covariates(X[[3, "b", "a"]]), table.x)
        with pytest.warns(UserWarning, match="matched by position"):
            np.testing.assert_array_equal(schema.read_covariates(X.to_numpy()), table.x)

    def test_large_values_keep_their_differences(self) -> None:
        days = 1_600_000_000 + np.arange(6)
        for values in (days, 1e-40 * np.arange(6), 3e38 * np.linspace(-1, 1, 6)):
            _, table = fit(values[:, None])
            expected = (np.arange(6) - 2.5) / np.arange(6).std()
            np.testing.assert_allclose(table.x[:, 0], expected, rtol=1e-5)

    def test_a_constant_column_becomes_zero(self) -> None:
        assert not fit(np.full((6, 1), 0.1))[1].x.any()

    def test_json_round_trip(self) -> None:
        X = pd.DataFrame({"a": 0.1 * Y, "b": ["u", "v"] * 3})
        for schema in (fit(X)[0], fit(X[["a"]].to_numpy())[0], fit(None)[0]):
            assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema

    @given(st.lists(st.floats(-1e30, 1e30), min_size=2), st.floats(-1e3, 1e3))
    def test_scale_restores_what_it_standardised(self, values, shift) -> None:
        values = np.array(values) + shift
        scale = Scale.fit(values)
        standardised = scale.standardise(values)
        assert np.isfinite(standardised).all()
        if values.min() < values.max():
            assert abs(standardised).max() < 1.01 * math.sqrt(len(values))
        tolerance = 1e-6 * max(np.ptp(values), abs(values).max() * 1e-9)
        np.testing.assert_allclose(scale.restore(standardised), values, rtol=1e-12, atol=tolerance)


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([0, 1, np.inf, 3, 4, 5], "column 'a' holds inf in row 2, but numbers must be finite"),
            ([0, -np.inf, 2, 3, 4, 5], "column 'a' holds -inf in row 1"),
            ([0, 1, 2, 3, 4, 1e39], r"column 'a' holds 1e\+39 in row 5.*float32 range.*rescale"),
            ([0, 1, 2, 3, 4, 10**400], "column 'a' holds inf in row 5"),
            (["3%", "10%", "7 %", "0%", None, "1%"], "column 'a' holds numbers with signs.*'3%'"),
            (["$1,200", "$90", "$7.50", "$0", "$1", "$2"], r"holds numbers with .*'\$1,200'"),
            (pd.date_range("2021-01-01", periods=6), "column 'a' holds dates or times"),
            (pd.date_range("2021-01-01", periods=6, tz="UTC"), "dates or times"),
            (pd.period_range("2021-01", periods=6, freq="M"), "dates or times"),
            (pd.to_timedelta(np.arange(6), unit="D"), "dates or times"),
            (pd.Categorical(pd.date_range("2021-01-01", periods=6)), "dates or times"),
            ([datetime.date(2021, 1, day) for day in range(1, 7)], "dates or times"),
            ([1, 2, 3, "4", 5, "many"], "column 'a' mixes numbers with text.*'many'.*categorical"),
            ([1j, 2, 3, 4, 5, 6], "column 'a' holds complex numbers"),
            ([[1]] * 6, "column 'a' holds values that are no numbers or text"),
            ([(1,)] * 6, "column 'a' holds a value of type tuple"),
            ([b"x"] * 6, "column 'a' holds a value of type bytes"),
        ],
    )
    def test_cells(self, values, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fit(pd.DataFrame({"a": values}))

    @pytest.mark.parametrize("text", DATES)
    def test_text_that_is_a_date(self, text: str) -> None:
        with pytest.raises(TableError, match=f"column 'a' holds dates or times \\('{text[:4]}"):
            fit(pd.DataFrame({"a": [text, text, None, text, "unknown", text]}))

    @pytest.mark.parametrize("text", NO_DATES)
    def test_text_that_is_no_date(self, text: str) -> None:
        assert fit_column([text, "x", text, None, "x", "x"])[0].categories is not None

    @pytest.mark.parametrize(
        ("X", "message"),
        [
            (Y, r"X has shape \(6,\).*reshape\(-1, 1\)"),
            (pd.Series(Y), r"X has shape \(6,\).* X\.to_frame\(\), for one row X\.to_frame\(\)\.T"),
            (np.zeros((6, 1, 1)), r"X has shape \(6, 1, 1\), but must be \(rows, covariates\)"),
            (np.array(3.0), r"X has shape \(\)"),
            ([[1], [1, 2]], "X cannot be read as an array"),
            (np.zeros((5, 1)), "X has 5, t has 6, y has 6"),
            (pd.DataFrame(np.zeros((6, 2)), columns=["a", "a"]), "more than one column 'a'"),
        ],
    )
    def test_shapes(self, X, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fit(X)

    @pytest.mark.parametrize(
        ("t", "message"),
        [
            (T + 1, "treatment t must hold 0 and 1.*but holds 1, 2: recode it.*t == 2"),
            (T * 0.5, "holds 0, 0.5"),
            (np.arange(6), "holds 0, 1, 2, 3, 4 and 1 more: recode it"),
            (["no", "yes"] * 3, "holds 'no', 'yes': recode it, for example as t == 'yes'"),
            (pd.Series(T + 1, name="drug"), "treatment 'drug' must hold 0 and 1"),
            (np.zeros(6), "treatment t is 0 in all 6 rows: an effect needs rows with treatment 0"),
            (np.ones(6), "treatment t is 1 in all 6 rows"),
            ([0, 1, None, 1, 0, 1], "treatment t is missing in 1 rows, the first being row 2"),
            ([0, 1, np.inf, 1, 0, 1], "treatment t holds inf in row 2"),
            (np.stack([T, T], axis=1), r"treatment t has shape \(6, 2\).*one value per row"),
            (T[:5], "X has 6, t has 5, y has 6"),
            (pd.date_range("2021-01-01", periods=6), "treatment t.* holds dates"),
        ],
    )
    def test_treatment(self, t, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fit(np.zeros((6, 1)), t)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (np.full(6, 3.0), "outcome y is 3 in all 6 rows: a constant outcome says nothing"),
            ([0.3] * 5 + [0.1 + 0.2], "outcome y is 0.3 in all 6 rows"),
            ([0, 1, np.nan, 1, 0, np.nan], "outcome y is missing in 2 rows, the first being row 2"),
            ([0, 1, -np.inf, 1, 0, 1], "outcome y holds -inf in row 2"),
            ([0, 1, 1e39, 1, 0, 1], r"outcome y holds 1e\+39 in row 2"),
            (["a", "b"] * 3, "outcome y must hold numbers, but holds 'a', 'b'"),
            (pd.Series(["a", "b"] * 3, name="kg"), "outcome 'kg' must hold numbers"),
            (["2021-01-01"] * 6, "outcome y holds dates"),
            (np.zeros((6, 2)), r"outcome y has shape \(6, 2\)"),
            (Y[:4], "X has 6, t has 6, y has 4"),
        ],
    )
    def test_outcome(self, y, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fit(np.zeros((6, 1)), T, y)

    @pytest.mark.parametrize(
        ("X", "message"),
        [
            ({"a": Y}, "X is a dict: pass it as a pandas DataFrame"),
            (scipy.sparse.eye(6).tocsr(), r"X is a sparse matrix: .* toarray\(\)"),
        ],
    )
    def test_other_containers(self, X, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fit(X)

    @pytest.mark.parametrize("convert", [pd.Series, lambda v: v.astype(str), pd.Series.to_frame])
    def test_covariates_that_hold_the_treatment_or_the_outcome(self, convert) -> None:
        data = pd.DataFrame({"age": Y[::-1], "drug": T, "kg": Y})
        t, y = convert(data["drug"]), convert(data["kg"])
        with pytest.raises(TableError, match="X holds the treatment t as its column 'drug': leave"):
            fit(data, t, y)
        X = data.drop(columns="drug")
        with pytest.raises(TableError, match=r"the outcome y as .* X\.drop\(columns='kg'\)"):
            fit(X, t, y)
        # Also where they are coded or rounded in another way.
        for column in (1 + T, np.where(T == 1, "a", "b"), np.float32(T)):
            with pytest.raises(TableError, match="X holds the treatment t as its column 'drug'"):
                fit(data.assign(drug=column), t, y)
        with pytest.raises(TableError, match="X holds the outcome y as its column 'kg'"):
            fit(X.assign(kg=np.float32(1000 * Y)), t, y)
        # The same name for other values, such as an earlier measurement, and other names are fine.
        fit(X.assign(kg=Y**2, age=Y), t, y)
        fit(X.assign(kg=1.0), t, y)
        fit(X, T, Y)

    def test_rows_in_another_order(self) -> None:
        X = pd.DataFrame({"a": Y}, index=list("uvwxyz"))
        t = pd.Series(T, index=X.index)
        shuffled = t.loc[list("zyxwvu")]
        with pytest.raises(TableError, match=r"X and t have .* another order.*t\.loc\[X\.index\]"):
            Schema.fit(X, shuffled, Y)
        # Other labels, repeated ones, or none say nothing about the order.
        for other in (
            shuffled.reset_index(drop=True),
            shuffled.set_axis(["u"] * 6),
            shuffled.array,
        ):
            assert Schema.fit(X, other, Y)[1].t.tolist() == shuffled.tolist()
        assert Schema.fit(X, shuffled.loc[X.index], Y)[1].t.tolist() == t.tolist()

    @pytest.mark.parametrize("X", [None, np.empty((0, 2)), pd.DataFrame({"a": []})])
    def test_empty_table(self, X) -> None:
        with pytest.raises(TableError, match="the table is empty"):
            fit(X, [], [])

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            (pd.DataFrame({"a": [1.0]}), "X lacks 'b': its columns must be .* 'a', 'b'"),
            (
                pd.DataFrame({"a": [1.0], "c": [1.0], "d": [1.0]}),
                "X lacks 'b' and has 'c', 'd' in addition",
            ),
            (pd.DataFrame({"a": [1.0], "b": ["w"]}), "column 'b' holds 'w', unseen.*'u', 'v'.*NaN"),
            (pd.DataFrame({"a": ["x"], "b": ["u"]}), "column 'a' held numbers.*now holds 'x'"),
            (pd.DataFrame({"a": [np.inf], "b": ["u"]}), "column 'a' holds inf in row 0"),
            (np.zeros((1, 3)), "X has 3 columns, but the table was fitted with 2"),
            (None, "X is None, but the table was fitted with covariates: 'a', 'b'"),
        ],
    )
    def test_queries(self, query, message: str) -> None:
        schema, _ = fit(pd.DataFrame({"a": Y, "b": ["u", "v"] * 3}))
        with pytest.raises(TableError, match=message):
            schema.read_covariates(query)

    def test_covariates_for_a_table_without_any(self) -> None:
        with pytest.raises(TableError, match="X has 1 columns, but the table was fitted with 0"):
            fit(None)[0].read_covariates(np.zeros((2, 1)))

    def test_positions_name_the_columns_of_an_array(self) -> None:
        X = np.zeros((6, 3))
        X[4, 1] = np.inf
        with pytest.raises(TableError, match="column 1 holds inf in row 4"):
            fit(X)
